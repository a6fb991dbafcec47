"""What a search may aim at in place of a sparsity: a share of parameters or time, an increase of perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmc.compressor.options.config import configure, sentences
from ssmc.compressor.options.flags import GOAL, Flag
from ssmc.compressor.options.patterns import combinable
from ssmc.compressor.options.renamed import renamed
from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure.phases import workload_text
from ssmc.runtime.models.memory import format_bytes, parse_bytes
from ssmc.runtime.ranks import ranks

GOALS = ("target_params", "target_latency", "target_memory", "max_ppl_increase")


class Goal(BaseModel):
    """What a search aims at. `split_goal` takes it out of the options of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_params: Annotated[
        float | None,
        Flag(
            "In place of a sparsity: the share of the dense model's parameters that may be left. A search finds what "
            "to remove.",
            GOAL,
            metavar="PART",
            default_text="",
        ),
    ] = None
    target_latency: Annotated[
        float | None,
        Flag(
            "In place of a sparsity: the share of the dense model's time that may be left, on this device.",
            GOAL,
            metavar="PART",
            default_text="",
        ),
    ] = None
    target_memory: Annotated[
        int | None,
        Flag(
            "In place of a sparsity: the memory that the weights, as they are stored, and --batch sequences of "
            "--length tokens may take, such as 8GiB. Keys and values of hybrids are in it, activations are not.",
            GOAL,
            metavar="SIZE",
            default_text="",
            typed=str,
        ),
    ] = None
    max_ppl_increase: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        Flag(
            "The largest increase of the perplexity that is allowed, 0.05 for 5 %. Given alone: the fastest model "
            "within it.",
            GOAL,
            metavar="PART",
            default_text="",
            typed=float,
        ),
    ] = None
    phase: Annotated[Literal["prefill", "decode"], Flag("Phase to measure: prefill or decode.", GOAL)] = "prefill"
    batch: Annotated[int, Field(ge=1), Flag("Sequences in one batch, and those that --target-memory holds.", GOAL)] = 1
    length: Annotated[
        int, Field(ge=1), Flag("Tokens of the prompt in a prefill, and of a sequence in memory.", GOAL)
    ] = 512
    latency_table: Annotated[
        str | None,
        Flag(
            "Latency table to use in place of measuring one: the ssmc.json of an earlier search.",
            GOAL,
            metavar="FILE",
            default_text="measured",
            typed=Path,
        ),
    ] = None
    candidate: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Flag(
            "Carry out this one of the ten candidates that a search over a hybrid lists, in place of the best of the "
            "first few that are tried. Where time counts, give --latency-table of that search as well, so that the "
            "list is the same.",
            GOAL,
            metavar="K",
            default_text="",
            typed=int,
        ),
    ] = None
    per_layer: Annotated[
        bool,
        Flag(
            "Let each layer have sizes of its own where that loses less. Only ONNX gets faster by it: for stock "
            "loaders all layers are filled up to the widest.",
            GOAL,
            switch="--per-layer",
        ),
    ] = False

    @field_validator("target_params", "target_latency")
    @classmethod
    def _inside(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("it is a share of the dense model and lies between 0 and 1, both excluded, such as 0.7")
        return value

    @field_validator("target_memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> int | None:
        try:
            return None if value is None else parse_bytes(value)
        except UsageError as error:
            raise ValueError(str(error).partition(" is ")[2].rstrip(".")) from error

    @model_validator(mode="after")
    def _has_a_goal(self) -> Goal:
        if not any(getattr(self, goal) is not None for goal in GOALS):
            given = ", ".join(sorted(self.model_fields_set))
            raise ValueError(f"there is no goal that {given} could belong to: give one of {', '.join(GOALS)}")
        return self

    @property
    def needs_time(self) -> bool:
        """Whether the search must know how long models take."""
        return self.target_latency is not None or (self.target_params is None and self.target_memory is None)

    @property
    def only_loss(self) -> bool:
        """Whether the search looks for speed within a bound of the loss, and for nothing else."""
        return self.target_params is None and self.target_latency is None and self.target_memory is None

    @property
    def only_memory(self) -> bool:
        """Whether nothing beside the memory has to get smaller."""
        return self.target_params is None and self.target_latency is None

    @property
    def sequences_text(self) -> str:
        """What the memory is for: "64 sequences of 4,096 tokens"."""
        return f"{self.batch:,} sequence{'s' if self.batch > 1 else ''} of {self.length:,} tokens"

    @property
    def most_nats(self) -> float:
        """The bound of the perplexity's increase as a loss in nats a token; infinite where there is none."""
        return math.inf if self.max_ppl_increase is None else math.log1p(self.max_ppl_increase)

    def __str__(self) -> str:
        wanted = []
        if self.target_latency is not None:
            what = workload_text(self.phase, self.batch, self.length)
            wanted.append(f"{self.target_latency:.4g} of the dense model's time for {what}")
        if self.target_params is not None:
            wanted.append(f"{self.target_params:.4g} of its parameters")
        if self.target_memory is not None:
            wanted.append(f"{format_bytes(self.target_memory)} of memory for its weights and {self.sequences_text}")
        if self.max_ppl_increase is not None:
            wanted.append(f"a perplexity at most {self.max_ppl_increase:.2%} higher")
        return ", ".join(wanted)


def split_goal(options: dict[str, Any]) -> tuple[Goal | None, dict[str, Any]]:
    """Take the goal out of the options of a run; what is left is that of an ordinary one.

    Returns:
        The goal, None if there is none, and the other options, the pattern that the search may use among them.

    Raises:
        UsageError: the goal makes no sense, does not go with the other options, or several processes were started.
    """
    options, _ = renamed(options)
    own = {
        name: value
        for name, value in options.items()
        if name in Goal.model_fields and value is not None and value is not False
    }
    rest = {name: value for name, value in options.items() if name not in Goal.model_fields}
    if not own:
        return None, rest
    if ranks() > 1:
        raise UsageError("A search with a goal is the work of one process. Leave torchrun out.")
    own = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
    try:
        goal = Goal(**own)
    except ValidationError as error:
        raise UsageError(sentences(error, Goal)) from error
    except (UnicodeEncodeError, RecursionError) as error:
        raise UsageError("The goal has a value that is no text that can be written. Correct it.") from error
    for name in ("sparsity", "states", "widths"):
        if rest.get(name) is not None:
            raise UsageError(f"{name} says what is removed, a search with a goal looks for it. Give one or the other.")
    able = combinable()
    rest["pattern"] = rest.get("pattern") or "+".join(able)
    config = configure(**rest)
    if unfit := [part for part in config.parts if part not in able] or config.modules:
        raise UsageError(
            f"A goal is met by removing layers, states and channels, not by {', '.join(unfit)}. Use a pattern of "
            f"{', '.join(able)}, or leave it out."
        )
    return goal, rest
