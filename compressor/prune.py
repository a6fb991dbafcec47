"""One pruning run in memory: which layers go is chosen first, then what goes inside those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.methods.layers import Removal, choose_removals, shed
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import LAYER, SSM_MODULE
from ssmc.compressor.pipeline import LayerResult, prune_layers
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.progress import Progress, silent


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
    device: torch.device,
    progress: Progress = silent,
) -> Pruned:
    """Carry out a configuration on `model`, in place and without changing a shape.

    Args:
        model: on the CPU, with the fast scan in use.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples; None when the run needs no text.
        config: what is removed and how.
        stored_dtypes: by tensor name, what the model will be saved as.
        device: where to compute.
        progress: told about the steps.
    """
    layers: list[LayerResult] = []
    removals: list[Removal] = []
    only_removed = config.pattern in (LAYER, SSM_MODULE) and not config.fits_out_proj()
    if LAYER in config.parts or SSM_MODULE in config.parts:
        # every try runs most of the model, so all of it goes to the device
        tried = None if tokens is None else tokens.to(device)
        remove = shed if only_removed else choose_removals
        removals = remove(model.to(device), architecture, tried, config, progress)
        model.cpu()
    if not only_removed:
        removed = {removal.layer for removal in removals}
        layers = prune_layers(model, architecture, tokens, config, stored_dtypes, progress, removed, Stage(device))
    return Pruned(tuple(layers), tuple(removals))
