"""The configuration that a run will leave, known before any work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.options.patterns import HEAD, HEAD_DIM, WIDTH

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture


def without_units(architecture: Architecture, config: Any, removed: Mapping[str, float]) -> Any:
    """The configuration once neurons, query heads, experts and heads are gone; None where none of them go, or can.

    Args:
        architecture: of the model.
        config: transformers' configuration of the dense model.
        removed: how much goes of each part of the pattern.
    """
    smaller = None
    if architecture.capabilities.heads and WIDTH not in removed and (HEAD in removed or HEAD_DIM in removed):
        sizes: Any = architecture.dimensions(config)
        heads = round(sizes.heads * (1 - removed.get(HEAD, 0)))
        head_dim = round(sizes.head_dim * (1 - removed.get(HEAD_DIM, 0)))
        if not architecture.capabilities.uniform and heads * head_dim % sizes.d_model == 0:  # the run refuses others
            smaller = cast(Any, architecture).with_heads(config, heads, head_dim)
    for part in architecture.units:
        if part.kind in removed and part.total(config) and part.refusal(config) is None:
            kept = units_to_keep(part, config, removed[part.kind])
            smaller = copy.deepcopy(config) if smaller is None else smaller
            part.resize(smaller, part.some(smaller, kept))
    return smaller
