"""The configuration that a run will leave of a hybrid, known before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from ssmc.compressor.methods.channels.counts import head_dim_to_keep
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.methods.width.counts import width_to_keep
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, WIDTH
from ssmc.runtime.models.architectures.plan import CHANNEL as CHANNELS
from ssmc.runtime.models.architectures.plan import STATE
from ssmc.runtime.models.families import Architecture

Refusal = Callable[[Architecture, Any], None]
"""Raises an SsmcError where no export of a configuration of a family would run where the result is for."""


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
