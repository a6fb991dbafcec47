"""What a compression run is asked to do: one typed, validated, immutable object, for the command line and recipes."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmc.runtime.errors import UsageError

from .masks import NM
from .sensitivity import ALPHA, check_ramp

POWER_OF_TWO = "power-of-two"
COLUMN, UNSTRUCTURED, LAYER, SSM_MODULE = "column", "unstructured", "layer", "ssm-module"
PATTERNS = (COLUMN, UNSTRUCTURED, LAYER, SSM_MODULE)  # and every N:M

SSM = "A_log"  # the name of the target that `ssm` stands for
FFN = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")  # in the order they run
TARGETS = {"ssm": (SSM,), "ffn": FFN, "all": (SSM, *FFN)}


class Score(StrEnum):
    """How the importance of a state, of an entry of A_log, or of a whole layer is judged."""

    magnitude = "magnitude"
    random = "random"
    sparsessm_vote = "sparsessm-vote"
    sparsessm = "sparsessm"
    sparsessm_l2 = "sparsessm-l2"
    energy = "energy"
    ghost = "ghost"
    exact = "exact"
    sparsegpt = "sparsegpt"
    mamba_shedder = "mamba-shedder"


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


# Which scores a pattern can be judged by, its default first.
_SCORES = {
    COLUMN: (Score.exact, *(s for s in Score if s not in (Score.exact, Score.sparsegpt, Score.mamba_shedder))),
    UNSTRUCTURED: (
        Score.sparsessm,
        *(s for s in Score if s not in (Score.sparsessm, Score.exact, Score.mamba_shedder)),
    ),
    LAYER: (Score.mamba_shedder, Score.random),
    SSM_MODULE: (Score.mamba_shedder, Score.random),
}


def scores_of(pattern: str) -> tuple[Score, ...]:
    """The scores a pattern can be judged by, its default first."""
    return _SCORES.get(pattern, _SCORES[UNSTRUCTURED])  # N:M on A_log judges entries, as unstructured does


class CompressConfig(BaseModel):
    """A compression run. Build it with `configure`, which turns mistakes into one clear sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pattern: str = COLUMN  # one of PATTERNS, or N:M: of every M entries N are kept
    target: str | None = None  # ssm, ffn, all, or module names with commas; None: ssm, or ffn for N:M
    sparsity: float = 0.5  # the part that goes, inside (0, 1); N:M says it by itself
    score: Score | None = None  # of states and layers; None: the pattern's default
    weighting: Weighting = Weighting.power  # of the score sparsessm
    ffn_score: FfnScore = FfnScore.sparsegpt
    alpha: Annotated[float, Field(ge=0)] = ALPHA  # Eq. 7: how far layers' sparsities spread around the mean
    repair: bool = True  # column: fold the least-squares repair into x_proj
    calib: str | None = None  # None: the sample that comes with `tiny`
    nsamples: Annotated[int, Field(ge=1)] = 64
    seqlen: Annotated[int, Field(ge=2)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    round_to: Annotated[int, Field(ge=1)] | Literal["power-of-two"] = 1
    tokenizer: str | None = None  # None: the one beside the model
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value not in PATTERNS and not _parse_nm(value):
            raise ValueError(f"it is one of {', '.join(PATTERNS)}, or N:M such as 2:4")
        return value

    @field_validator("sparsity")
    @classmethod
    def _inside(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("it is the part that is removed and lies between 0 and 1, both excluded, such as 0.5")
        return value

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
        allowed = scores_of(self.pattern)
        if self.score is not None and self.score not in allowed:
            names = ", ".join(s.value for s in allowed)
            raise ValueError(f"score {self.score.value} does not judge the pattern {self.pattern}; {names} do")
        if self.pattern in (LAYER, SSM_MODULE) and self.target is not None:
            raise ValueError(f"target does not go with the pattern {self.pattern}, which removes whole modules")
        if self.modules and self.nm is None:
            check_ramp(self.sparsity, self.alpha)
        return self

    @property
    def nm(self) -> NM | None:
        """The pattern as N:M, None if it is none."""
        return _parse_nm(self.pattern)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that are pruned, in the order they run, A_log first."""
        if self.pattern in (LAYER, SSM_MODULE):
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
        """The score that is used: the one asked for, or the pattern's default."""
        return self.score or scores_of(self.pattern)[0]

    @property
    def needs_text(self) -> bool:
        """Whether anything is decided or fitted by running the model."""
        if self.modules and self.ffn_score is not FfnScore.magnitude:
            return True
        if self.pattern == COLUMN and SSM in self.targets and self.repair:
            return True
        blind = self.judge in (Score.magnitude, Score.random)
        return not blind and (SSM in self.targets or self.pattern in (LAYER, SSM_MODULE))


def configure(**options: Any) -> CompressConfig:
    """Validate options.

    Raises:
        UsageError: naming every option that is wrong, what it was and what it may be.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    try:
        return CompressConfig(**options)
    except ValidationError as error:
        raise UsageError(" ".join(dict.fromkeys(_sentence(e) for e in error.errors()))) from error


def _sentence(error: Any) -> str:
    reason = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not error["loc"]:
        return reason[0].upper() + reason[1:] + "."
    option = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"There is no option {option!r}; there are {', '.join(CompressConfig.model_fields)}."
    if error["type"] == "missing":
        return f"{option.upper()} is missing: name one on the command line, or in the recipe."
    if option == "round_to":  # a union: pydantic complains once for each member
        reason = f"it should be a whole number of at least 1, or {POWER_OF_TWO}"
    return f"{option} {error['input']!r} does not work: {reason}."


def _parse_nm(pattern: str) -> NM | None:
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    return NM(int(match[1]), int(match[2])) if match else None


def kept_states(d_state: int, sparsity: float, round_to: int | str = 1) -> int:
    """How many of `d_state` states stay: the nearest whole number, then the nearest allowed one, ties to fewer.

    Args:
        d_state: N of the dense model.
        sparsity: part that is removed, inside (0, 1).
        round_to: a number K must be a multiple of, or "power-of-two".

    Raises:
        UsageError: nothing would be removed, or nothing would stay.
    """
    wanted = d_state * (1 - sparsity)
    if round_to == POWER_OF_TWO:
        allowed = [2**e for e in range(int(math.log2(d_state)) + 1)]
    else:
        allowed = list(range(round_to, d_state + 1, round_to))
    if not allowed:
        raise UsageError(f"round_to {round_to} is more than the {d_state} states there are. Use a smaller one.")
    kept = min(allowed, key=lambda k: (abs(k - wanted), k))
    if round_to == 1 and wanted < 0.5:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states would leave none; the most is {1 - 1 / d_state:g} (one state)."
        )
    if kept == d_state:
        raise UsageError(
            f"sparsity {sparsity} of {d_state} states, rounded to {round_to}, removes none; "
            f"use at least {1 / d_state:g} or another round_to."
        )
    return kept
