"""From a masked model to a physically smaller one: what is silent is cut out."""

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
    """Cut what was pruned out of a masked model: states, or whole blocks.

    The manifest says what was kept; the weights are asked whether the rest really is silent, since cutting what still
    speaks would silently make another model. Patterns that make nothing smaller leave every tensor as it is.

    Raises:
        CheckpointError: manifest and weights do not fit together.
    """
    removed = [entry["layer"] for entry in manifest["removed"]]
    if removed and manifest["config"]["pattern"] == "layer":
        return _cut_blocks(masked, removed, directory)
    if not manifest["layers"]:  # SSMs were silenced; no loader has a block without one
        return Shrunk(masked.tensors(), masked.config, [])
    return _cut_states(masked, [layer["kept"] for layer in manifest["layers"]], directory)


def _cut_states(masked: Checkpoint, kept: list[list[int]], directory: Path) -> Shrunk:
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
    if all(len(states) == masked.dimensions.d_state for states in kept):
        return Shrunk(masked.tensors(), masked.config, [])
    return Shrunk(*masked.architecture.cut_states(masked.tensors(), masked.config, kept))


def _cut_blocks(masked: Checkpoint, removed: list[int], directory: Path) -> Shrunk:
    blocks = masked.architecture.blocks(masked.model)
    for index in removed:
        if index >= len(blocks) or not masked.architecture.is_removed(blocks[index]):
            raise CheckpointError(
                f"Layer {index} of the model in {directory} is not silent although the manifest calls it removed; its "
                "weights were changed after compressing. Compress again."
            )
    return Shrunk(*masked.architecture.cut_blocks(masked.tensors(), masked.config, removed))
