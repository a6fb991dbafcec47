"""Prune a model in memory, as `ssmc compress` does with one that it read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ssmc.compressor import CompressConfig, Run, make_plan, prune
from ssmc.compressor.pipeline import Pruned
from ssmc.runtime.progress import NO_PROGRESS, Progress


def pruned(
    model: nn.Module,
    architecture: Any,
    tokens: torch.Tensor | None,
    config: CompressConfig,
    dtypes: Mapping[str, torch.dtype],
    progress: Progress = NO_PROGRESS,
) -> Pruned:
    """What happened to the layers of `model`, which is pruned in place."""
    plan = make_plan(config, architecture, architecture.dimensions(model.config), model.config)
    return prune(Run(model, plan, tokens, dtypes, progress=progress))
