"""What a model family can be pruned by; what is not listed is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ssmc.compressor.methods.channels.counts import widths_of_heads
from ssmc.compressor.options.config import PROJECTIONS, CompressConfig
from ssmc.compressor.options.goal import Goal
from ssmc.compressor.options.patterns import (
    ATTENTION,
    CHANNEL,
    COLUMN,
    EXPERT,
    EXPERT_WIDTH,
    HEAD,
    HEAD_DIM,
    LAYER,
    MLP,
    SSM_MODULE,
    UNSTRUCTURED,
    WIDTH,
    combinable,
    scores_of,
)
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models import families
from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions
from ssmc.runtime.models.architectures.plan import MODEL
from ssmc.runtime.models.families import BLOCK, STATE, Architecture, Dimensions
from ssmc.runtime.models.outline import Outline

UNITS = (MLP, ATTENTION, EXPERT, EXPERT_WIDTH)
HEADS = (HEAD, HEAD_DIM)
PATTERNS = (COLUMN, CHANNEL, *HEADS, LAYER, *UNITS, WIDTH, UNSTRUCTURED, SSM_MODULE)
"""Patterns that a family may refuse; N:M counts as unstructured, and those of other packages say it themselves."""

_NOTHING_ELSE = "its blocks hold a norm and a mixer and nothing else"
_NO_EXPERTS, _OF_EXPERTS = "its blocks have no experts", (EXPERT, EXPERT_WIDTH)
_NO_HEADS = "its mixers have no heads; --pattern channel removes channels"
_ALIKE = "it is there to compare with, for models with one kind of block"
_OF_PARTS = {COLUMN: STATE, CHANNEL: families.CHANNEL, HEAD: families.HEAD, HEAD_DIM: families.HEAD, LAYER: BLOCK}
_OF_PARTS |= {WIDTH: MODEL}
"""Part of a pattern -> what it makes smaller, as `Capabilities.fixed` names it."""
_WHAT = {
    COLUMN: "whole states",
    CHANNEL: "channels of d_inner",
    LAYER: "whole blocks",
    UNSTRUCTURED: "single entries",
    SSM_MODULE: "the SSM of whole blocks",
    HEAD: "heads of the mixers",
    HEAD_DIM: "channels of each head",
    MLP: "neurons of MLPs",
    ATTENTION: "query heads of attention",
    EXPERT: "whole experts",
    EXPERT_WIDTH: "neurons of every expert",
    WIDTH: "directions of the residual stream",
}


_GAINS = {
    HEAD: "fewer parameters, a smaller state, faster prefill and decode",
    HEAD_DIM: "fewer parameters, a smaller state, faster prefill and decode",
    MLP: "fewer parameters, faster prefill and decode",
    ATTENTION: "fewer parameters; where whole groups go, fewer keys and values",
    EXPERT: "fewer parameters; a token is sent to as many as before",
    EXPERT_WIDTH: "fewer parameters, faster prefill and decode",
    WIDTH: "fewer parameters in every linear map, in embedding and head",
}
"""What patterns bring whose share of the parameters depends on the configuration."""


def able_parts(config: CompressConfig, architecture: Architecture, goal: Goal) -> list[str]:
    """Those parts of a pattern that a search for a goal tries; heads of a Mamba-2 go by the same part as width."""
    able = [part for part in config.parts if part in searched_parts(architecture)]
    return able if searches_width(architecture, goal) else [part for part in able if part not in (WIDTH, *HEADS)]


def searches_axes(architecture: Architecture, goal: Goal) -> bool:
    """Whether a search for a goal goes by the axes of a hybrid; for memory alone its states are counted instead."""
    return goal.target_memory is None and not architecture.capabilities.uniform


def searches_width(architecture: Architecture, goal: Goal) -> bool:
    """Whether a search for a goal cuts d_model: where nothing is decided by layer, and nothing timed but in a hybrid,
    whose table has narrower models as well."""
    timed = goal.needs_time and architecture.capabilities.uniform
    return MODEL not in architecture.capabilities.fixed and not (timed or goal.per_layer)


def searched_parts(architecture: Architecture) -> list[str]:
    """Those parts that a search tries for a family: of a hybrid the states alone."""
    never = (CHANNEL,) if architecture.capabilities.heads else ()
    able = [part for part in combinable() if part in parts_of(architecture) and part not in never]
    return able if architecture.capabilities.uniform else [part for part in able if part == COLUMN]


def axes_of_hybrid(architecture: Architecture) -> list[str]:
    """The axes that a search for a goal tries in a hybrid. Layers are not among them: which go decides what that saves.

    None of other families, whose search goes by layers, too.
    """
    if architecture.capabilities.uniform:
        return []
    every = (COLUMN, CHANNEL, HEAD, HEAD_DIM, MLP, ATTENTION, EXPERT, EXPERT_WIDTH, WIDTH)
    return [axis for axis in every if axis in parts_of(architecture)]


def parts_of(architecture: Architecture) -> tuple[str, ...]:
    """The parts of patterns that a family can be pruned by; N:M counts as unstructured."""
    return tuple(part for part in PATTERNS if f"--pattern {part}" not in limits(architecture))


def limits(architecture: Architecture) -> dict[str, str]:
    """What is refused for a family, option by option, with the reason."""
    able, found = architecture.capabilities, {}
    for part in PATTERNS:
        reason = _ALIKE if part == SSM_MODULE and not able.uniform else able.fixed.get(_OF_PARTS.get(part, part))
        if part in HEADS and not able.heads:
            reason = _NO_HEADS
        if part in UNITS and not reason and all(own.kind != part for own in architecture.units):
            reason = _NOTHING_ELSE if able.uniform or part not in _OF_EXPERTS else _NO_EXPERTS
        if reason:
            found[f"--pattern {part}"] = reason
    return found


def check_family(config: CompressConfig, architecture: Architecture, goal: Goal | None = None) -> None:
    """Refuse what is not carried out, or makes no sense, for this family.

    Args:
        config: the run.
        architecture: of the model.
        goal: what it aims at in place of a sparsity; None: it has one.

    Raises:
        UsageError: naming what can be used.
    """
    able, refused, name = parts_of(architecture), limits(architecture), architecture.model_type
    if goal is not None and WIDTH in config.parts and not searches_width(architecture, goal):
        why = "all layers have one d_model" if goal.per_layer else "tables of times are of one d_model"
        raise UsageError(
            f"A search does not cut width here: {why}. Leave width out of --pattern, or give --sparsity in place of "
            "a goal."
        )
    if goal is not None and not architecture.capabilities.uniform:
        _check_goal_of_hybrid(config, goal, architecture)
    known = [part for part in config.parts if part in PATTERNS or config.nm]
    wrong = [part for part in known if part not in able and not (config.nm and UNSTRUCTURED in able)]
    if wrong:
        pattern = UNSTRUCTURED if config.nm else wrong[0]
        reason = refused.get(f"--pattern {pattern}")
        raise UsageError(
            f"The pattern {wrong[0]} is not carried out for {name}{f': {reason}' if reason else ' yet'}; "
            f"{', '.join(able)} can be used."
        )
    if not architecture.capabilities.heads:
        return
    own = {"conv1d", *architecture.projections}
    if lacking := [module for module in PROJECTIONS if module not in own and module in (config.scope or "").split(",")]:
        raise UsageError(
            f"The scope {lacking[0]} does not exist in {name}, whose in_proj makes B, C and dt itself. "
            "Use in_proj, conv1d, out_proj or ffn."
        )
    alone = [part for part in HEADS if part in config.parts and WIDTH not in config.parts]
    if goal is not None and architecture.capabilities.uniform and (CHANNEL in config.parts or alone):
        which = "+".join(alone) or CHANNEL
        advice = (
            f"use --pattern {HEAD}+{HEAD_DIM}+{WIDTH}, which cuts d_model by the same part"
            if searches_width(architecture, goal)
            else "give --sparsity in place of a goal"
        )
        raise UsageError(
            "No goal is looked for among the heads of a Mamba-2 alone: stock loaders take so few widths that there is "
            f"next to nothing to search. Leave {which} out of --pattern, or {advice}."
        )


def _check_goal_of_hybrid(config: CompressConfig, goal: Goal, architecture: Architecture) -> None:
    """Refuse what a search does not do in a hybrid: it looks for states that fit into memory, or along its axes."""
    name, axes = architecture.model_type, axes_of_hybrid(architecture)
    if goal.per_layer:
        raise UsageError(
            f"Layers of one kind have one size in {name}, as its configuration has: no stock loader takes sizes that "
            "differ by layer. Leave --per-layer out."
        )
    if goal.target_memory is None:
        if other := [part for part in config.parts if part not in axes]:
            raise UsageError(
                f"A search removes {', '.join(axes)} of {name}, not {', '.join(other)}. Leave that out of --pattern."
            )
        return
    if not goal.only_memory:
        raise UsageError(
            f"--target-memory of {name} is met by removing states alone, and no other goal goes with it. Leave the "
            "others out, or --target-memory."
        )
    if other := [part for part in config.parts if part != COLUMN]:
        raise UsageError(
            f"A search for --target-memory removes states of {name}, not {', '.join(other)}. Use --pattern column."
        )


@dataclass(frozen=True)
class Prospect:
    """A pattern a model can be pruned by, and what it would bring."""

    pattern: str
    what: str
    score: str  # the default one
    gain: str  # at a sparsity of one half


def prospects(outline: Outline) -> list[Prospect]:
    """What a model can be pruned by and what that makes smaller, from its sizes alone."""
    sizes, able, count = outline.dimensions, parts_of(outline.architecture), outline.count
    whole = count(sizes.n_layer, sizes.d_inner, sizes.d_state)

    def smaller(**changes: int) -> str:
        left = count(**({"n_layer": sizes.n_layer, "d_inner": sizes.d_inner, "d_state": sizes.d_state} | changes))
        return f"{1 - left / whole:.1%} fewer parameters"

    found = []
    for pattern in able:
        gain = _GAINS.get(pattern, "nothing smaller: zeros")
        if pattern == COLUMN:
            gain = f"half of the SSM state and its scan, {smaller(d_state=max(1, sizes.d_state // 2))}"
        elif pattern == CHANNEL:
            if outline.architecture.capabilities.heads:
                found += _heads(sizes, smaller)
                continue
            gain = smaller(d_inner=max(1, sizes.d_inner // 2))
        elif pattern == LAYER and not outline.architecture.capabilities.uniform:
            gain = "as much as the layers that go have: its kinds differ in size"
        elif pattern == LAYER:
            gain = smaller(n_layer=max(1, sizes.n_layer // 2))
        name = f"{pattern}, N:M" if pattern == UNSTRUCTURED else pattern
        found.append(Prospect(name, _WHAT[pattern], scores_of(pattern)[0], gain))
    return found


def _heads(sizes: Dimensions, smaller: Callable[..., str]) -> list[Prospect]:
    """Whole heads, down to the narrowest width a stock loader takes; nothing if there is none."""
    widths = widths_of_heads(sizes)
    if not widths:
        return []
    heads = sizes.d_inner // cast(Mamba2Dimensions, sizes).head_dim
    what = f"{heads - heads * widths[0] // sizes.d_inner} of {heads} heads"
    return [Prospect(CHANNEL, what, scores_of(CHANNEL)[0], smaller(d_inner=widths[0]))]
