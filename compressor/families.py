"""What a model family can be pruned by; what is not listed is refused before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.checkpoints import Checkpoint, parameter_counter
from ssmc.runtime.errors import UsageError

from .config import CompressConfig
from .patterns import CHANNEL, COLUMN, LAYER, PATTERNS, SSM_MODULE, UNSTRUCTURED, Score, scores_of

_PARTS = {"mamba": PATTERNS, "mamba2": (COLUMN, LAYER)}  # N:M counts as unstructured
_WHAT = {
    COLUMN: "whole states",
    CHANNEL: "channels of d_inner",
    LAYER: "whole blocks",
    UNSTRUCTURED: "single entries",
    SSM_MODULE: "the SSM of whole blocks",
}


def able_parts(config: CompressConfig, model_type: str) -> list[str]:
    """Those parts of a pattern that are carried out for a family."""
    return [part for part in config.parts if part in _PARTS[model_type]]


def check_family(config: CompressConfig, model_type: str) -> None:
    """Refuse what is not carried out, or makes no sense, for this family.

    Raises:
        UsageError: naming what can be used.
    """
    able = _PARTS[model_type]
    wrong = [part for part in config.parts if part not in able and not (config.nm and UNSTRUCTURED in able)]
    if wrong:
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {model_type} yet; {', '.join(able)} can be used."
        )
    if model_type != "mamba" and COLUMN in config.parts:
        if config.judge_of(COLUMN) is Score.magnitude:
            raise UsageError(
                f"The score magnitude cannot tell the states of {model_type} apart: a head has one A_log for all of "
                "them. Use another score."
            )
        if config.modules:
            raise UsageError(
                f"The projections of {model_type} are not pruned together with its states yet. Use target ssm."
            )


@dataclass(frozen=True)
class Prospect:
    """A pattern a model can be pruned by, and what it would bring."""

    pattern: str
    what: str
    score: str  # the default one
    gain: str  # at a sparsity of one half


def prospects(checkpoint: Checkpoint) -> list[Prospect]:
    """What a model can be pruned by and what that makes smaller, from its sizes alone."""
    sizes, able = checkpoint.dimensions, _PARTS[checkpoint.architecture.model_type]
    count = parameter_counter(checkpoint.config)
    whole = count(sizes.n_layer, sizes.d_inner, sizes.d_state)

    def smaller(**changes: int) -> str:
        left = count(**({"n_layer": sizes.n_layer, "d_inner": sizes.d_inner, "d_state": sizes.d_state} | changes))
        return f"{1 - left / whole:.1%} fewer parameters"

    found = []
    for pattern in able:
        gain = "nothing smaller: zeros"
        if pattern == COLUMN:
            gain = f"half of the SSM state and its scan, {smaller(d_state=max(1, sizes.d_state // 2))}"
        elif pattern == CHANNEL:
            gain = smaller(d_inner=max(1, sizes.d_inner // 2))
        elif pattern == LAYER:
            gain = smaller(n_layer=max(1, sizes.n_layer // 2))
        name = f"{pattern}, N:M" if pattern == UNSTRUCTURED else pattern
        found.append(Prospect(name, _WHAT[pattern], scores_of(pattern)[0].value, gain))
    return found
