"""What a model family can be pruned by; what is not listed is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ssmc.compressor.counts import widths_of_heads
from ssmc.compressor.options.config import SSM, CompressConfig
from ssmc.compressor.options.patterns import (
    CHANNEL,
    COLUMN,
    LAYER,
    PATTERNS,
    SSM_MODULE,
    UNSTRUCTURED,
    Score,
    scores_of,
)
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import Checkpoint, parameter_counter
from ssmc.runtime.models.families import Dimensions

_TARGETS = "--target-latency, --target-params, --max-ppl-increase"
_PLACED = "which blocks are of which kind follows from their number, so none can go"
_WIDE = "d_inner is a whole multiple of hidden_size in its configuration"
_LISTED = "cutting the list of kinds of blocks in its configuration is not built yet"
_NARROW = "heads of a hybrid's mixers are not cut yet"
_MANY = "widths and depths of a hybrid are not tried"
_ALIKE = "it is there to compare with, for models with one kind of block"


@dataclass(frozen=True)
class _Family:
    """What can be done with a family."""

    parts: tuple[str, ...]  # N:M counts as unstructured
    limits: dict[str, str] = field(default_factory=dict)  # option -> why it is refused
    heads: bool = False  # a head has one A_log for all of its states


def _hybrid(parts: tuple[str, ...], heads: bool = False) -> _Family:
    """A family with other layers beside those with a mixer; those whose mixers have heads list the kinds of blocks."""
    why = {LAYER: _LISTED if heads else _PLACED, CHANNEL: _NARROW if heads else _WIDE, SSM_MODULE: _ALIKE}
    limits = {f"--pattern {part}": why[part] for part in PATTERNS if part not in parts}
    return _Family(parts, limits | {_TARGETS: _MANY}, heads)


_FAMILIES = {
    "mamba": _Family(PATTERNS),
    "mamba2": _Family(PATTERNS, heads=True),
    "falcon_mamba": _Family(PATTERNS),
    "jamba": _hybrid((COLUMN, UNSTRUCTURED)),
    "bamba": _hybrid((COLUMN, UNSTRUCTURED), heads=True),
    "granitemoehybrid": _hybrid((COLUMN, UNSTRUCTURED), heads=True),
    "falcon_h1": _hybrid((COLUMN, UNSTRUCTURED), heads=True),
    "nemotron_h": _hybrid((COLUMN, UNSTRUCTURED), heads=True),
    "zamba2": _hybrid((COLUMN, UNSTRUCTURED), heads=True),
}
_LACKS = ("x_proj", "dt_proj")  # of families with heads, whose in_proj makes B, C and dt itself
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
    return [part for part in config.parts if part in _FAMILIES[model_type].parts and part not in never]


def check_family(config: CompressConfig, model_type: str, aims: bool = False) -> None:
    """Refuse what is not carried out, or makes no sense, for this family.

    Args:
        config: the run.
        model_type: as in a transformers config.json.
        aims: whether it has a target in place of a sparsity.

    Raises:
        UsageError: naming what can be used.
    """
    family = _FAMILIES[model_type]
    able = family.parts
    if aims and _TARGETS in family.limits:
        raise UsageError(f"There is no search for a target for {model_type}: {_MANY}. Give a sparsity.")
    wrong = [part for part in config.parts if part not in able and not (config.nm and UNSTRUCTURED in able)]
    if wrong:
        pattern = UNSTRUCTURED if config.nm else wrong[0]
        reason = family.limits.get(f"--pattern {pattern}")
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {model_type}{f': {reason}' if reason else ' yet'}; "
            f"{', '.join(able)} can be used."
        )
    if not family.heads:
        return
    if lacking := [name for name in _LACKS if name in (config.target or "").split(",")]:
        raise UsageError(
            f"The target {lacking[0]} does not exist in {model_type}, whose in_proj makes B, C and dt itself. "
            "Use in_proj, conv1d, out_proj or ffn."
        )
    _check_heads(config, model_type)
    if aims and CHANNEL in config.parts:
        raise UsageError(
            "No target is looked for among the heads of a Mamba-2: stock loaders take so few widths that there is next "
            "to nothing to search. Leave channel out of --pattern, or give --sparsity in place of a target."
        )


def _check_heads(config: CompressConfig, model_type: str) -> None:
    """Refuse scores that have nothing to judge where a head has one A_log for all of its states and channels."""
    if COLUMN in config.parts and config.judge_of(COLUMN) is Score.magnitude:
        raise UsageError(
            f"The score magnitude cannot tell the states of {model_type} apart: a head has one A_log for all of them. "
            "Use another score."
        )
    if COLUMN not in config.parts and SSM in config.targets and config.judge is Score.sparsegpt:
        raise UsageError(
            f"SparseGPT on A_log lets a channel's other states make up for one that goes; a head of {model_type} has "
            "one A_log, so nothing is left to do so. Use another score."
        )


def limits(model_type: str) -> dict[str, str]:
    """What is refused for a family, option by option, with the reason."""
    return dict(_FAMILIES[model_type].limits)


@dataclass(frozen=True)
class Prospect:
    """A pattern a model can be pruned by, and what it would bring."""

    pattern: str
    what: str
    score: str  # the default one
    gain: str  # at a sparsity of one half


def prospects(checkpoint: Checkpoint) -> list[Prospect]:
    """What a model can be pruned by and what that makes smaller, from its sizes alone."""
    sizes, able = checkpoint.dimensions, _FAMILIES[checkpoint.architecture.model_type].parts
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
