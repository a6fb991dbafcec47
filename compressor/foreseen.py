"""What a run will leave, known before any work: sizes, and of a hybrid its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from ssmc.compressor.methods.channels.counts import head_dim_to_keep
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.methods.width.counts import width_to_keep
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, WIDTH
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.plan import CHANNEL as CHANNELS
from ssmc.runtime.models.architectures.plan import STATE
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
    channels, d_model = max(plan.keep.channels), sizes.d_model
    if HEAD_DIM in plan.config.parts:
        channels = channels // cast(Any, sizes).head_dim * head_dim_to_keep(plan)
    if WIDTH in plan.config.parts:
        d_model = width_to_keep(plan)
    left = replace(sizes, d_model=d_model, d_inner=channels, d_state=max(plan.keep.states))
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
    config, sizes, parts = copy.deepcopy(plan.model_config), plan.sizes, plan.config.parts
    channels = max(plan.keep.channels)
    if CHANNEL in parts and sizes.heads is None:
        config = architecture.with_size(config, CHANNELS, channels)
    elif HEAD in parts or HEAD_DIM in parts:
        head_dim = cast(Any, sizes).head_dim
        heads = channels // head_dim
        head_dim = head_dim_to_keep(plan) if HEAD_DIM in parts else head_dim
        config = architecture.with_heads(config, heads, head_dim)
    if COLUMN in parts:
        config = architecture.with_size(config, STATE, max(plan.keep.states) * sizes.groups)
    for part in architecture.units:
        if part.kind in parts and part.total(plan.model_config) and part.refusal(plan.model_config) is None:
            kept = units_to_keep(part, plan.model_config, plan.config.sparsity_of(part.kind))
            part.resize(config, part.some(plan.model_config, kept))
    return architecture.with_d_model(config, width_to_keep(plan)) if WIDTH in parts else config
