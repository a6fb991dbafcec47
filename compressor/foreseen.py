"""What a run will leave, known before any work: sizes, and of a hybrid its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from ssmc.compressor.methods.channels.counts import head_dim_to_keep
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.methods.width.counts import width_to_keep
from ssmc.compressor.options.patterns import HEAD_DIM, WIDTH
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.plan import CHANNEL as CHANNELS
from ssmc.runtime.models.architectures.plan import STATE
from ssmc.runtime.models.architectures.units import Part
from ssmc.runtime.models.consumers import misfit
from ssmc.runtime.models.families import Architecture

Refusal = Callable[[Architecture, Any], None]
"""Raises an SsmcError where no export of a configuration of a family would run where the result is for."""


def refuse_misfit(plan: Plan) -> None:
    """Refuse sizes that the runtime that the result is for does not run.

    Raises:
        UsageError: with the reason.
    """
    runtime, sizes = plan.config.runtime, plan.sizes
    if runtime is None:
        return
    heads, head_dim = _inner(plan)
    left = replace(sizes, d_model=_d_model(plan), d_inner=heads * head_dim, d_state=max(plan.keep.states))
    if reason := misfit(runtime, left):
        raise UsageError(
            f"{runtime} does not run what would be left: {reason}. Give another --sparsity or --pattern, or leave out "
            "--for."
        )


def configuration_left(plan: Plan) -> Any:
    """transformers' configuration of the export of a run, as far as it changes; None for families that are no hybrids.

    Args:
        plan: of the run, with what it keeps.
    """
    architecture: Any = plan.architecture
    if architecture.capabilities.uniform:
        return None
    config, parts = plan.model_config, plan.config.parts
    units = [
        (part, units_to_keep(part, config, plan.config.sparsity_of(part.kind)))
        for part in architecture.units
        if part.kind in parts and part.total(config) and part.refusal(config) is None
    ]
    return with_sizes(architecture, config, _inner(plan), max(plan.keep.states), units, _d_model(plan))


def with_sizes(
    architecture: Any, config: Any, inner: tuple[int, int], states: int, units: Iterable[tuple[Part, int]], d_model: int
) -> Any:
    """The configuration of a smaller hybrid.

    Args:
        architecture: of its family.
        config: transformers' configuration of the dense model.
        inner: heads of a mixer and channels of each; without heads as many "heads" of one channel.
        states: of a group.
        units: how many stay of parts; of those that are not there, all.
        d_model: how much of the residual stream stays.
    """
    smaller, sizes = copy.deepcopy(config), architecture.dimensions(config)
    heads, head_dim = inner
    if heads * head_dim != sizes.d_inner and sizes.heads is None:
        smaller = architecture.with_size(smaller, CHANNELS, heads)
    elif heads * head_dim != sizes.d_inner:
        smaller = architecture.with_heads(smaller, heads, head_dim)
    smaller = architecture.with_size(smaller, STATE, states * sizes.groups)
    for part, kept in units:
        if kept < part.total(config):
            part.resize(smaller, part.some(smaller, kept))
    return smaller if d_model == sizes.d_model else architecture.with_d_model(smaller, d_model)


def _inner(plan: Plan) -> tuple[int, int]:
    """Heads of a mixer and channels of each that stay; without heads as many "heads" of one channel."""
    channels, sizes = max(plan.keep.channels), cast(Any, plan.sizes)
    if sizes.heads is None:
        return channels, 1
    return channels // sizes.head_dim, head_dim_to_keep(plan) if HEAD_DIM in plan.config.parts else sizes.head_dim


def _d_model(plan: Plan) -> int:
    return width_to_keep(plan) if WIDTH in plan.config.parts else plan.sizes.d_model
