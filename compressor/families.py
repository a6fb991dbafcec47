"""What a model family can be pruned by; what is not listed is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ssmc.runtime.architectures import Dimensions
from ssmc.runtime.checkpoints import Checkpoint, parameter_counter
from ssmc.runtime.errors import UsageError

from .config import SSM, CompressConfig
from .counts import widths_of_heads
from .patterns import CHANNEL, COLUMN, LAYER, PATTERNS, SSM_MODULE, UNSTRUCTURED, Score, scores_of

_PARTS = {"mamba": PATTERNS, "mamba2": PATTERNS}  # N:M counts as unstructured
_LACKS = {"mamba2": ("x_proj", "dt_proj")}  # in_proj makes B, C and dt itself
_WHAT = {
    COLUMN: "whole states",
    CHANNEL: "channels of d_inner",
    LAYER: "whole blocks",
    UNSTRUCTURED: "single entries",
    SSM_MODULE: "the SSM of whole blocks",
}


def able_parts(config: CompressConfig, model_type: str) -> list[str]:
    """Those parts of a pattern that a search for a target tries: heads of a Mamba-2 go by halves, or not at all."""
    never = (CHANNEL,) if model_type == "mamba2" else ()
    return [part for part in config.parts if part in _PARTS[model_type] and part not in never]


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
    if lacking := [name for name in _LACKS.get(model_type, ()) if name in (config.target or "").split(",")]:
        raise UsageError(
            f"The target {lacking[0]} does not exist in {model_type}, whose in_proj makes B, C and dt itself. "
            "Use in_proj, conv1d, out_proj or ffn."
        )
    if model_type == "mamba2":
        _check_heads(config)


def _check_heads(config: CompressConfig) -> None:
    """Refuse scores that have nothing to judge where a head has one A_log for all of its states and channels."""
    if COLUMN in config.parts and config.judge_of(COLUMN) is Score.magnitude:
        raise UsageError(
            "The score magnitude cannot tell the states of mamba2 apart: a head has one A_log for all of them. "
            "Use another score."
        )
    if COLUMN not in config.parts and SSM in config.targets and config.judge is Score.sparsegpt:
        raise UsageError(
            "SparseGPT on A_log lets a channel's other states make up for one that goes; a head of mamba2 has one "
            "A_log, so nothing is left to do so. Use another score."
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
            if sizes.heads is not None:
                found += _heads(sizes, smaller)
                continue
            gain = smaller(d_inner=max(1, sizes.d_inner // 2))
        elif pattern == LAYER:
            gain = smaller(n_layer=max(1, sizes.n_layer // 2))
        name = f"{pattern}, N:M" if pattern == UNSTRUCTURED else pattern
        found.append(Prospect(name, _WHAT[pattern], scores_of(pattern)[0].value, gain))
    return found


def _heads(sizes: Dimensions, smaller: Callable[..., str]) -> list[Prospect]:
    """Whole heads, down to the narrowest width a stock loader takes; nothing if there is none."""
    widths = widths_of_heads(sizes)
    if not widths:
        return []
    what = f"{sizes.heads - widths[0] // sizes.head_dim} of {sizes.heads} heads"
    return [Prospect(CHANNEL, what, scores_of(CHANNEL)[0].value, smaller(d_inner=widths[0]))]
