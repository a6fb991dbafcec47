"""What a compression run is asked to do: one typed, validated, immutable object, for the command line and recipes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ssmc.compressor.methods.weights.masks import NM
from ssmc.compressor.methods.weights.sensitivity import ALPHA, check_ramp
from ssmc.compressor.options.patterns import (
    BLIND,
    CHANNEL,
    COLUMN,
    LAYER,
    SSM_MODULE,
    Score,
    check_parts,
    parse_nm,
    parse_pattern,
    parse_values,
    scores_of,
)
from ssmc.runtime.errors import UsageError

POWER_OF_TWO = "power-of-two"

SSM = "A_log"  # the name of the target that `ssm` stands for
FFN = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")  # in the order they run
TARGETS = {"ssm": (SSM,), "ffn": FFN, "all": (SSM, *FFN)}
WHOLE = (LAYER, CHANNEL, SSM_MODULE)  # patterns that have no target: they take all of a layer's modules


class FfnScore(StrEnum):
    """How the weights of the projections and of conv1d are pruned."""

    sparsegpt = "sparsegpt"
    wanda = "wanda"
    magnitude = "magnitude"


class Weighting(StrEnum):
    """Weight of time step t in the score `sparsessm`, t counted from the first step that has a state behind it."""

    power = "power"  # 1 / (t + 1)
    linear = "linear"  # L - t
    discount = "discount"  # 0.9^t
    window = "window"  # 1 for the first quarter, then 0
    uniform = "uniform"  # 1


class CompressConfig(BaseModel):
    """A compression run. Build it with `configure`, which turns mistakes into one clear sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pattern: str = COLUMN  # one of PATTERNS, several of COMBINABLE with +, or N:M: of every M entries N are kept
    target: str | None = None  # ssm, ffn, all, or module names with commas; None: ssm, or ffn for N:M
    sparsity: float | dict[str, float] = 0.5  # the part that goes, inside (0, 1); for all parts, or by part
    score: Score | dict[str, Score] | None = None  # of states, channels, layers; None: the part's default
    weighting: Weighting = Weighting.power  # of the score sparsessm
    ffn_score: FfnScore = FfnScore.sparsegpt
    alpha: Annotated[float, Field(ge=0)] = ALPHA  # Eq. 7: how far layers' sparsities spread around the mean
    repair: bool = True  # column, channel, layer: fold a least-squares repair into the weights that stay
    refine: Annotated[int, Field(ge=0)] = 0  # gradient steps on each pruned layer, at most
    calib: str | None = None  # None: the sample that comes with `tiny`
    nsamples: Annotated[int, Field(ge=1)] = 64
    seqlen: Annotated[int, Field(ge=2)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    round_to: Annotated[int, Field(ge=1)] | Literal["power-of-two"] = 1
    round_channels: Annotated[int, Field(ge=1)] | None = None  # None: 64, or less for narrow models
    states: tuple[int, ...] | None = None  # kept in each layer, in place of the sparsity of `column`
    widths: tuple[int, ...] | None = None  # channels kept in each layer, in place of the sparsity of `channel`
    tokenizer: str | None = None  # None: the one beside the model
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        return "+".join(parse_pattern(value))

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsities(cls, value: Any, info: ValidationInfo) -> float | dict[str, float]:
        values = _by_part(value, info)
        if not isinstance(values, dict):
            return _fraction(values)
        if missing := [part for part in parse_pattern(info.data["pattern"]) if part not in values]:
            raise ValueError(f"it does not say how much of {', '.join(missing)} goes")
        return {part: _fraction(content) for part, content in values.items()}

    @field_validator("score", mode="before")
    @classmethod
    def _scores(cls, value: Any, info: ValidationInfo) -> Any:
        values = _by_part(value, info)
        names = values.values() if isinstance(values, dict) else [] if values is None else [values]
        known = [score.value for score in Score]
        if not all(name in known for name in names):
            raise ValueError(f"it should be {', '.join(known)}")
        return values

    @field_validator("states", "widths", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        values = value.split(",") if isinstance(value, str) else value
        try:
            counts = None if values is None else tuple(int(str(count)) for count in values)
        except (TypeError, ValueError):
            counts = ()
        if counts is not None and not (counts and min(counts) >= 1):
            raise ValueError("it is a whole number of at least 1 for each layer, with commas between")
        return counts

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        words = [] if value is None else value.split(",")
        unknown = [w for w in words if w not in (*TARGETS, SSM, *FFN)]
        if unknown:
            raise ValueError(f"it is {', '.join(TARGETS)}, or some of {SSM}, {', '.join(FFN)} with commas between")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompressConfig:
        self._check_scores()
        if self.target is not None and any(part in WHOLE for part in self.parts):
            raise ValueError(f"target does not go with the pattern {self.pattern}, which removes whole modules")
        for name, counts, part in (("states", self.states, COLUMN), ("widths", self.widths, CHANNEL)):
            if counts is not None and part not in self.parts:
                raise ValueError(f"{name} goes with the pattern {part}, which is not in {self.pattern}")
        if self.modules and self.nm is None:
            check_ramp(self.sparsity, self.alpha)
        if self.refine:
            self._check_refine()
        return self

    def _check_refine(self) -> None:
        """There is something left in a pruned layer, and a sample to judge it by."""
        if self.pattern in (LAYER, SSM_MODULE):
            raise ValueError(
                f"refine does not go with the pattern {self.pattern}, which leaves nothing of a layer to refine; "
                "it goes with column, channel, their combinations, and patterns of zeros"
            )
        if self.nsamples < 2:
            raise ValueError("refine needs nsamples of at least 2: some samples judge the steps on the others")

    def _check_scores(self) -> None:
        """Every score judges its part; one for all parts judges at least one of them."""
        by_part = self.score if isinstance(self.score, dict) else {}
        wrong = [(score, part) for part, score in by_part.items() if score not in scores_of(part)]
        if isinstance(self.score, Score) and all(self.score not in scores_of(part) for part in self.parts):
            wrong = [(self.score, self.pattern)]
        for score, part in wrong:
            able = dict.fromkeys(s.value for name in part.split("+") for s in scores_of(name))
            raise ValueError(f"score {score.value} does not judge the pattern {part}; {', '.join(able)} do")

    @property
    def parts(self) -> tuple[str, ...]:
        """What is removed, in the order it is carried out; one word unless the pattern is a combined one."""
        return tuple(self.pattern.split("+"))

    def sparsity_of(self, part: str) -> float:
        """How much goes of one part of the pattern."""
        return self.sparsity[part] if isinstance(self.sparsity, dict) else self.sparsity

    def judge_of(self, part: str) -> Score:
        """The score one part of the pattern is judged by: the one asked for if it can, or the part's default."""
        allowed = scores_of(part)
        asked = self.score.get(part) if isinstance(self.score, dict) else self.score
        return asked if asked in allowed else allowed[0]

    @property
    def nm(self) -> NM | None:
        """The pattern as N:M, None if it is none."""
        return parse_nm(self.pattern)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that are pruned, in the order they run, A_log first."""
        if all(part in WHOLE for part in self.parts):
            return ()
        words = (self.target or ("ffn" if self.nm else "ssm")).split(",")
        wanted = {name for word in words for name in TARGETS.get(word, (word,))}
        return tuple(name for name in (SSM, *FFN) if name in wanted)

    @property
    def modules(self) -> tuple[str, ...]:
        """The projections and conv1d among the targets."""
        return tuple(name for name in self.targets if name != SSM)

    @property
    def judge(self) -> Score:
        """The score that is used; of a combined pattern, that of its first part."""
        return self.judge_of(self.parts[0])

    def fits_out_proj(self, mixes_readers: bool = True) -> bool:
        """Whether out_proj is fitted to the dense model's residual stream after all else.

        Args:
            mixes_readers: whether the repair of removed states folds into their C rows; where it does not, out_proj is
                what is left to fit.
        """
        whole = CHANNEL in self.parts or LAYER in self.parts
        return self.repair and (whole or (COLUMN in self.parts and not mixes_readers))

    @property
    def needs_text(self) -> bool:
        """Whether anything is decided or fitted by running the model."""
        if self.refine or (self.modules and self.ffn_score is not FfnScore.magnitude):
            return True
        judged = [part for part in self.parts if part in WHOLE or SSM in self.targets]
        if self.fits_out_proj() or (self.repair and COLUMN in judged):
            return True
        return any(self.judge_of(part) not in BLIND for part in judged)


def configure(**options: Any) -> CompressConfig:
    """Validate options.

    Raises:
        UsageError: naming every option that is wrong, what it was and what it may be.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    try:
        return CompressConfig(**options)
    except ValidationError as error:
        raise UsageError(sentences(error, CompressConfig)) from error


def sentences(error: ValidationError, options: type[BaseModel]) -> str:
    """What is wrong with options, in words.

    Args:
        error: as pydantic tells it.
        options: whose fields they are.
    """
    return " ".join(dict.fromkeys(_sentence(e, options) for e in error.errors()))


def _sentence(error: Any, options: type[BaseModel]) -> str:
    reason = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not error["loc"]:
        return reason[0].upper() + reason[1:] + "."
    option = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"There is no option {option!r}; there are {', '.join(options.model_fields)}."
    if error["type"] == "missing":
        return f"{option.upper()} is missing: name one on the command line, or in the recipe."
    if option == "round_to":  # a union: pydantic complains once for each member
        reason = f"it should be a whole number of at least 1, or {POWER_OF_TWO}"
    return f"{option} {error['input']!r} does not work: {reason}."


def _by_part(value: Any, info: ValidationInfo) -> Any:
    """A plain value, or a mapping from parts of the pattern; one for a single part is taken out of its mapping."""
    values = parse_values(value)
    if not isinstance(values, dict):
        return values
    if "pattern" not in info.data:
        raise ValueError("the pattern it belongs to is wrong")
    parts = parse_pattern(info.data["pattern"])
    check_parts(values, parts)
    return values[parts[0]] if len(parts) == 1 else {part: values[part] for part in parts if part in values}


def _fraction(value: Any) -> float:
    """A number inside (0, 1)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("it is a number between 0 and 1, or such a number for each part of the pattern") from None
    if isinstance(value, bool) or not 0 < number < 1:
        raise ValueError("it is the part that is removed and lies between 0 and 1, both excluded, such as 0.5")
    return number
