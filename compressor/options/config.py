"""What a compression run is asked to do: one typed, validated, immutable object, for the command line and recipes.

Every option is declared here, once, with its help text: `ssmc compress` makes its command line out of these fields
(`ssmc.cli.declared`), and a recipe is these fields as YAML. Nothing here imports torch.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ssmc.compressor.options.flags import CALIBRATION, QUANTIZATION, Flag
from ssmc.compressor.options.patterns import (
    CHANNEL,
    COLUMN,
    NOTHING,
    UNSTRUCTURED,
    WEIGHTS,
    check_parts,
    parse_nm,
    parse_pattern,
    parse_values,
    pattern_of,
    patterns,
    score_names,
    scores_of,
)
from ssmc.compressor.options.quantization import DEFAULT_MODULES, GROUP, OPTIONS, check_group, parse_modules
from ssmc.compressor.options.renamed import renamed
from ssmc.compressor.options.sparsity import ALPHA, NM, check_ramp
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.consumers import CONSUMERS

POWER_OF_TWO = "power-of-two"
AUTO_STEPS = 600  # of `distill: auto`: 1.2 million tokens
_OF_PRUNING = ("pattern", "sparsity", "score", "scope", "states", "widths")  # options that say what to prune

A_LOG = "A_log"  # what the scope `ssm` stands for
PROJECTIONS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")  # the scope `ffn`, in the order they run
SCOPES = {"ssm": (A_LOG,), "ffn": PROJECTIONS, "all": (A_LOG, *PROJECTIONS)}


class Weighting(StrEnum):
    """Weight of time step t in the score `sparsessm`, t counted from the first step that has a state behind it."""

    power = "power"  # 1 / (t + 1)
    linear = "linear"  # L - t
    discount = "discount"  # 0.9^t
    window = "window"  # 1 for the first quarter, then 0
    uniform = "uniform"  # 1


def _what_is_removed() -> str:
    combined = [p.help for p in patterns().values() if p.combines is not None]
    alone = [p.help for p in patterns().values() if p.combines is None]
    return (
        f"What is removed. {', '.join(combined)} make a model smaller and faster and can be combined: "
        f"`column+channel`. {'; '.join(alone)}."
    )


def _default_scores() -> str:
    return ", ".join(f"{scores_of(name)[0]} for {name}" for name in patterns())


def _weight_scores() -> str:
    return "|".join(scores_of(WEIGHTS))


class CompressConfig(BaseModel):
    """A compression run. Build it with `configure`, which turns mistakes into one clear sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pattern: Annotated[
        str,
        Flag(
            _what_is_removed,
            metavar="column|channel|head|head-dim|layer|mlp|attention|expert|expert-width|width|unstructured|N:M|...",
            completes="pattern",
        ),
    ] = COLUMN
    scope: Annotated[
        str | None,
        Flag(
            "In which modules: `ssm` (A_log), `ffn` (the projections and conv1d), `all`, or names of modules. Goes "
            "with patterns of states and of single weights.",
            metavar="ssm|ffn|all|MODULE,...",
            default_text="ssm; ffn for N:M",
        ),
    ] = None
    sparsity: Annotated[
        float | dict[str, float],
        Flag(
            "The part that is removed, between 0 and 1. For a combined pattern one number for all, or one for each: "
            "`column=0.75,channel=0.5`.",
            metavar="PART|PATTERN=PART,...",
            typed=str,
        ),
    ] = 0.5
    score: Annotated[
        str | dict[str, str] | None,
        Flag(
            "Importance score that decides what is removed; they are listed above.",
            metavar="SCORE|PATTERN=SCORE,...",
            default_text="exact for column, obs for channel, mamba-shedder for layers, ghost else",
            typed=str,
            completes="score",
        ),
    ] = None
    weighting: Annotated[Weighting, Flag("Weight of the time steps in `--score sparsessm`.")] = Weighting.power
    pruned_entry: Annotated[
        Literal["zero", "forget"],
        Flag(
            "What a pruned entry of A_log is stored as. `zero`: 0, that is A = -1, a state like others. `forget`: 12, "
            "so that exp(dt A) is 0 and the state has no memory, which is what the paper evaluates.",
        ),
    ] = "zero"
    ffn_score: Annotated[
        str,
        Flag(
            "Score that decides about the weights of the projections and of conv1d: sparsegpt, wanda or magnitude.",
            metavar="SCORE",
        ),
    ] = "sparsegpt"
    alpha: Annotated[
        float,
        Field(ge=0),
        Flag("How far the sparsities of in_proj and out_proj differ between layers, by sensitivity (Eq. 7)."),
    ] = ALPHA
    repair: Annotated[
        bool,
        Flag(
            "Refit what stays so that it makes up for what is removed (least squares, written into x_proj and "
            "out_proj).",
            switch="--repair/--no-repair",
        ),
    ] = True
    recall_weight: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False),
        Flag(
            "How much more than others a calibration token counts where the text repeats something from more than 100 "
            "tokens back, when states are chosen by `exact` and repaired. 0: all count the same.",
            metavar="FLOAT",
        ),
    ] = 10.0
    refine: Annotated[
        int,
        Field(ge=0),
        Flag(
            "Gradient steps on each layer after it is pruned, at most, towards the output of the dense layer (no "
            "labels). 150 is a good number, 0 means none. This takes longer than all the rest.",
            metavar="STEPS",
        ),
    ] = 0
    distill: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"],
        Flag(
            "Gradient steps on all parameters together after everything else, at most, towards the predictions of the "
            f"dense model on the calibration text (no labels). 300 is a good number, `auto` is {AUTO_STEPS}, 0 means "
            "none. It helps most where channels, heads or layers are removed, and takes minutes. With a goal, "
            "candidates are then judged by what a few steps make of them.",
            metavar="STEPS|auto",
            typed=str,
        ),
    ] = 0
    quantize: Annotated[
        Literal["w8", "w4"] | None,
        Flag(
            "Weights of the linear maps in 8 or 4 bits, after everything that prunes and repairs. Without a pattern, a "
            "sparsity or a goal nothing is pruned.",
            QUANTIZATION,
            metavar="w8|w4",
            default_text="",
            typed=str,
        ),
    ] = None
    quantize_method: Annotated[
        Literal["gptq", "awq", "rtn"],
        Flag(
            "How codes are chosen. `gptq`: input after input, the others make up for each; `awq`: nearest, after the "
            "inputs that matter were scaled up where a norm can undo it; `rtn`: nearest, without text.",
            QUANTIZATION,
        ),
    ] = "gptq"
    group_size: Annotated[
        int,
        Flag(
            "Inputs that share a scale, a power of two; where it does not divide the inputs, its half or quarter. "
            "llama.cpp has groups of 32.",
            QUANTIZATION,
            metavar="INT",
        ),
    ] = GROUP
    symmetric: Annotated[
        bool,
        Flag(
            "Codes without zero points, which every format and kernel takes, or with them.",
            QUANTIZATION,
            switch="--symmetric/--asymmetric",
        ),
    ] = True
    quantize_modules: Annotated[
        str,
        Flag(
            "Which linear maps; `maps` are those of attention and MLP in a hybrid.",
            QUANTIZATION,
            metavar="MODULE,...",
        ),
    ] = DEFAULT_MODULES
    quantize_embedding: Annotated[
        Literal["w8", "w4"] | None,
        Flag(
            "Embedding and head in 8 or 4 bits, too, rounded to nearest.",
            QUANTIZATION,
            metavar="w8|w4",
            default_text="",
            typed=str,
        ),
    ] = None
    calib: Annotated[
        str | None,
        Flag(
            "Calibration text: a .txt, .jsonl or .parquet file, a folder of them, `wikitext2`, `c4`, `ptb` or a data "
            "set of the hub.",
            CALIBRATION,
            metavar="SRC",
            default_text="the embedded stories",
        ),
    ] = None
    nsamples: Annotated[int, Field(ge=1), Flag("Number of calibration samples.", CALIBRATION)] = 64
    seqlen: Annotated[int, Field(ge=2), Flag("Tokens in one sample.", CALIBRATION)] = 2048
    seed: Annotated[
        int,
        Field(ge=0, lt=2**63),
        Flag("Seed of the draw of samples. The same seed gives the same bytes.", CALIBRATION),
    ] = 0
    hidden_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Flag(
            "What hidden states of the samples are kept in between two layers. Half precision takes half of the memory "
            "and changes the result a little; see also --max-memory.",
            CALIBRATION,
        ),
    ] = "float32"
    runtime: Annotated[
        Literal[tuple(CONSUMERS)] | None,  # type: ignore[valid-type]
        Flag(
            "Runtime the result is for: keeps numbers of states, channels and heads that it takes and gains from, and "
            "refuses what it does not run.",
            metavar="|".join(CONSUMERS),
            default_text="",
            switch="--for",
            typed=str,
        ),
    ] = None
    round_to: Annotated[
        Annotated[int, Field(ge=1)] | Literal["power-of-two"],
        Flag(
            "Keep a multiple of this many states, or a power of two: some runtimes are faster only then.",
            metavar="INT|power-of-two",
            typed=str,
        ),
    ] = 1
    round_channels: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag(
            "Keep a multiple of this many channels. Hardware is fast with 64, or 32 or 16.",
            metavar="INT",
            default_text="64, less for narrow models",
            typed=int,
        ),
    ] = None
    states: Annotated[
        tuple[int, ...] | None,
        Flag(
            "States to keep in each layer, in place of a sparsity of `column`.",
            metavar="K,K,...",
            default_text="the same number in every layer",
            typed=str,
        ),
    ] = None
    widths: Annotated[
        tuple[int, ...] | None,
        Flag(
            "Channels to keep in each layer, in place of a sparsity of `channel`. Stock loaders have one width for all "
            "layers: for them, narrower layers are filled up with zeros.",
            metavar="W,W,...",
            default_text="the same number in every layer",
            typed=str,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Flag("Folder or hub id of the tokenizer.", CALIBRATION, metavar="SRC", default_text="the model's own"),
    ] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("Device to compute on.", CALIBRATION)] = "auto"

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
        known = score_names()
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

    @field_validator("group_size")
    @classmethod
    def _whole_group(cls, value: int) -> int:
        return check_group(value)

    @field_validator("quantize_modules", mode="before")
    @classmethod
    def _modules(cls, value: Any) -> str:
        return ",".join(parse_modules(value))

    @field_validator("ffn_score")
    @classmethod
    def _known_weight_score(cls, value: str) -> str:
        if value not in scores_of(WEIGHTS):
            raise ValueError(f"it should be {', '.join(scores_of(WEIGHTS))}")
        return value

    @field_validator("scope")
    @classmethod
    def _known_scope(cls, value: str | None) -> str | None:
        words = [] if value is None else value.split(",")
        if any(word not in (*SCOPES, A_LOG, *PROJECTIONS) for word in words):
            names = ", ".join((A_LOG, *PROJECTIONS))
            raise ValueError(f"it is {', '.join(SCOPES)}, or some of {names} with commas between")
        return value

    @model_validator(mode="before")
    @classmethod
    def _nothing_to_prune(cls, options: Any) -> Any:
        """Quantisation alone prunes nothing, unless something says what to prune."""
        alone = isinstance(options, dict) and options.get("quantize") is not None
        if alone and all(options.get(name) is None for name in _OF_PRUNING):
            return {**options, "pattern": NOTHING}
        return options

    @model_validator(mode="after")
    def _fits_together(self) -> CompressConfig:
        self._check_scores()
        self._check_quantize()
        if self.pruned_entry == "forget" and not self._sets_entries():
            raise ValueError(
                "pruned_entry forget goes with patterns that set single entries of A_log: unstructured, or N:M with "
                "scope ssm or all"
            )
        if self.scope is not None and not all(pattern_of(part).takes_scope for part in self.parts):
            raise ValueError(f"scope does not go with the pattern {self.pattern}, which removes whole modules")
        for name, counts, part in (("states", self.states, COLUMN), ("widths", self.widths, CHANNEL)):
            if counts is not None and part not in self.parts:
                raise ValueError(f"{name} goes with the pattern {part}, which is not in {self.pattern}")
        if self.modules and self.nm is None:
            check_ramp(self.sparsity_of(self.parts[0]), self.alpha)
        if self.refine:
            self._check_refine()
        return self

    def _sets_entries(self) -> bool:
        """Whether single entries of A_log are pruned, not whole states."""
        return self.prunes_a_log and (self.nm is not None or UNSTRUCTURED in self.parts)

    def _check_quantize(self) -> None:
        """Options of quantisation go with it, and it comes last."""
        if self.quantize is None:
            given = [name for name in OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
            if given:
                raise ValueError(f"{given[0]} goes with quantize, which says in how many bits: w8 or w4")
            if NOTHING in self.parts:
                raise ValueError(f"the pattern {NOTHING} removes nothing and goes with quantize: w8 or w4")
            return
        if self.distill:
            raise ValueError(
                "distill does not go with quantize: its steps move every weight off the codes. Use refine, or quantise "
                "the distilled model's export by itself"
            )
        if self.refine and NOTHING in self.parts:
            raise ValueError(f"refine makes up for what was pruned; the pattern {NOTHING} prunes nothing")

    def _check_refine(self) -> None:
        """There is something left in a pruned layer, and a sample to judge it by."""
        if all(pattern_of(part).whole_blocks for part in self.parts):
            raise ValueError(
                f"refine does not go with the pattern {self.pattern}, which leaves nothing of a layer to refine; "
                "it goes with column, channel, their combinations, and patterns of zeros"
            )
        if unfit := [part for part in self.parts if not pattern_of(part).refines]:
            raise ValueError(
                f"refine does not go with {' and '.join(unfit)}: its steps move mixers only; distill moves the whole "
                "model"
            )
        if self.nsamples < 2:
            raise ValueError("refine needs nsamples of at least 2: some samples judge the steps on the others")

    def _check_scores(self) -> None:
        """Every score goes with its part; one for all parts goes with at least one of them."""
        by_part = self.score if isinstance(self.score, dict) else {}
        wrong = [(score, part) for part, score in by_part.items() if score not in scores_of(part)]
        if isinstance(self.score, str) and all(self.score not in scores_of(part) for part in self.parts):
            wrong = [(self.score, self.pattern)]
        for score, part in wrong:
            able = dict.fromkeys(s for name in part.split("+") for s in scores_of(name))
            raise ValueError(f"score {score} does not go with the pattern {part}; {', '.join(able)} do")

    @property
    def parts(self) -> tuple[str, ...]:
        """What is removed, in the order it is carried out; one word unless the pattern is a combined one."""
        return tuple(self.pattern.split("+"))

    @property
    def distill_steps(self) -> int:
        """Gradient steps on the whole model."""
        return AUTO_STEPS if self.distill == "auto" else self.distill

    def sparsity_of(self, part: str) -> float:
        """How much goes of one part of the pattern."""
        return self.sparsity[part] if isinstance(self.sparsity, dict) else self.sparsity

    def score_of(self, part: str) -> str:
        """The score that decides about one part of the pattern: the one asked for if it can, or the part's default."""
        allowed = scores_of(part)
        asked = self.score.get(part) if isinstance(self.score, dict) else self.score
        return asked if asked in allowed else allowed[0]

    @property
    def first_score(self) -> str:
        """The score that is used; of a combined pattern, that of its first part."""
        return self.score_of(self.parts[0])

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """The linear maps that are quantised, in the order they run."""
        return tuple(self.quantize_modules.split(","))

    @property
    def nm(self) -> NM | None:
        """The pattern as N:M, None if it is none."""
        return parse_nm(self.pattern)

    @property
    def in_scope(self) -> tuple[str, ...]:
        """The modules that are pruned, in the order they run, A_log first; none where whole modules are removed."""
        if not any(pattern_of(part).takes_scope for part in self.parts):
            return ()
        words = (self.scope or ("ffn" if self.nm else "ssm")).split(",")
        wanted = {name for word in words for name in SCOPES.get(word, (word,))}
        return tuple(name for name in (A_LOG, *PROJECTIONS) if name in wanted)

    @property
    def prunes_a_log(self) -> bool:
        """Whether states, or entries of A_log, are removed."""
        return A_LOG in self.in_scope

    @property
    def modules(self) -> tuple[str, ...]:
        """The projections and conv1d among the modules in scope."""
        return tuple(name for name in self.in_scope if name != A_LOG)


def configure(**options: Any) -> CompressConfig:
    """Validate options, by their present names or those of 0.1.

    Raises:
        UsageError: naming every option that is wrong, what it was and what it may be.
    """
    options, _ = renamed(options)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    try:
        return CompressConfig(**options)
    except ValidationError as error:
        raise UsageError(sentences(error, CompressConfig)) from error
    except (UnicodeEncodeError, RecursionError) as error:  # pydantic's own, of half characters and of endless values
        raise UsageError("An option has a value that is no text that can be written. Correct it.") from error


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
    if option == "distill":
        reason = "it should be a whole number of at least 0, or auto"
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
