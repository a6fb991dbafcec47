"""What a compression run is asked to do: one typed, validated, immutable object."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ssmc.runtime.errors import UsageError

POWER_OF_TWO = "power-of-two"


class Pattern(str, Enum):
    """What is removed."""

    column = "column"
    """Whole states: column n of A_log and the B and C rows n of x_proj, for all channels."""


class Score(str, Enum):
    """How the importance of a state is judged."""

    magnitude = "magnitude"
    random = "random"
    sparsessm_vote = "sparsessm-vote"
    sparsessm = "sparsessm"
    sparsessm_l2 = "sparsessm-l2"
    energy = "energy"
    ghost = "ghost"
    exact = "exact"


class CompressConfig(BaseModel):
    """A compression run. Build it with `configure`, which turns mistakes into one clear sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pattern: Pattern = Pattern.column
    sparsity: float = 0.5  # the part of the states that goes, inside (0, 1)
    score: Score = Score.exact
    repair: bool = True  # fold the least-squares repair into x_proj
    calib: str | None = None  # None: the sample that comes with `tiny`
    nsamples: Annotated[int, Field(ge=1)] = 64
    seqlen: Annotated[int, Field(ge=2)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    round_to: Annotated[int, Field(ge=1)] | Literal["power-of-two"] = 1
    tokenizer: str | None = None  # None: the one beside the model
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("sparsity")
    @classmethod
    def _inside(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("it is the part that is removed and lies between 0 and 1, both excluded, such as 0.5")
        return value


def configure(**options: Any) -> CompressConfig:
    """Validate options.

    Raises:
        UsageError: naming every option that is wrong, what it was and what it may be.
    """
    try:
        return CompressConfig(**options)
    except ValidationError as error:
        raise UsageError(" ".join(_sentence(e) for e in error.errors())) from error


def _sentence(error: Any) -> str:
    option = str(error["loc"][0]) if error["loc"] else "the configuration"
    if error["type"] == "extra_forbidden":
        known = ", ".join(CompressConfig.model_fields)
        return f"There is no option {option!r}; there are {known}."
    reason = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    return f"{option} {error['input']!r} does not work: {reason}."


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
