"""One pruning run in memory: which layers go is chosen first, then what goes inside those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.runtime.architectures import Architecture
from ssmc.runtime.progress import Progress, silent

from .config import CompressConfig
from .patterns import LAYER, SSM_MODULE
from .pipeline import LayerResult, prune_layers
from .shedder import Removal, choose_removals, shed


@dataclass(frozen=True)
class Pruned:
    """What happened to a model."""

    layers: tuple[LayerResult, ...]  # empty when only whole layers or SSMs were removed
    removals: tuple[Removal, ...]  # whole layers or SSMs that were removed, in that order


def prune(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor | None,
    config: CompressConfig,
    stored_dtypes: Mapping[str, torch.dtype],
    progress: Progress = silent,
) -> Pruned:
    """Carry out a configuration on `model`, in place and without changing a shape.

    Args:
        model: with the fast scan in use.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples; None when the run needs no text.
        config: what is removed and how.
        stored_dtypes: by tensor name, what the model will be saved as.
        progress: told about the steps.
    """
    layers: list[LayerResult] = []
    removals: list[Removal] = []
    if config.pattern in (LAYER, SSM_MODULE):
        removals = shed(model, architecture, tokens, config, progress)
    else:
        if LAYER in config.parts:
            removals = choose_removals(model, architecture, tokens, config, progress)
        removed = {removal.layer for removal in removals}
        layers = prune_layers(model, architecture, tokens, config, stored_dtypes, progress, removed)
    return Pruned(tuple(layers), tuple(removals))
