"""What an export for a runtime would refuse, refused before minutes of compressing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.options.patterns import HEAD, HEAD_DIM, WIDTH
from ssmc.exporters.registry import format_named, refuse_missing
from ssmc.runtime.models.checkpoints import read_description
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.consumers import consumer_named, refuse_family
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.tokenizers import tokenizer_directory


def refuse_unfit(
    model: str | Path,
    runtime: str,
    tokenizer: str | Path | None = None,
    removed: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Refuse a model by its configuration and tokenizer, where no export of it could run in a runtime.

    Args:
        model: a folder, a hub id, or an embedded model.
        runtime: see `ssmc.runtime.models.consumers`.
        tokenizer: as `compress` is told it, where the model has none of its own.
        removed: how much goes of each part of the pattern, as far as it is known.

    Raises:
        SsmcError: with the reason.
    """
    format, directory = format_named(consumer_named(runtime).format), find_directory(model)
    architecture, config = read_description(directory, str(model))
    refuse_family(runtime, architecture)
    refuse_missing(format, architecture)
    files = tokenizer_directory(directory, tokenizer)
    format.foresee(architecture, config, files)
    smaller = _without_units(architecture, config, removed)
    if smaller is not None:
        format.foresee(architecture, smaller, files)


def _without_units(architecture: Architecture, config: Any, removed: Mapping[str, float]) -> Any:
    """The configuration once neurons, query heads, experts and heads are gone; None where none of them go, or can."""
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
