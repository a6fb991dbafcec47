"""From a masked model to a physically smaller one: the silent parts are cut out of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.architectures import Cut
from ssmc.runtime.checkpoints import Checkpoint
from ssmc.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, not yet on disk."""

    tensors: dict[str, torch.Tensor]  # by transformers' names, in their stored dtypes
    config: Any  # transformers configuration with the new sizes
    cuts: list[Cut]  # what got smaller


def shrink(masked: Checkpoint, manifest: dict[str, Any], directory: Path) -> Shrunk:
    """Cut the pruned states out of a masked model.

    The manifest says which states were kept; the weights are asked whether the others really are silent, since
    cutting a state that still speaks would silently make another model.

    Raises:
        CheckpointError: manifest and weights do not fit together.
    """
    kept = [layer["kept"] for layer in manifest["layers"]]
    blocks = masked.architecture.blocks(masked.model)
    if len(kept) != len(blocks):
        raise CheckpointError(
            f"The manifest in {directory} speaks of {len(kept)} layers, its model has {len(blocks)}. Compress again."
        )
    for index, (block, states) in enumerate(zip(blocks, kept, strict=True)):
        if not masked.architecture.is_masked(masked.architecture.mixer(block), states):
            raise CheckpointError(
                f"Layer {index} of the model in {directory} still uses states the manifest calls pruned; its weights "
                "were changed after compressing. Compress again."
            )
    return Shrunk(*masked.architecture.cut_states(masked.tensors(), masked.config, kept))
