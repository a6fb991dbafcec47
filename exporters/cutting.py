"""From a masked model to a physically smaller one: what is silent is cut out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.families import Architecture, Cut


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, not yet on disk."""

    tensors: dict[str, torch.Tensor]  # by transformers' names, in their stored dtypes
    config: Any  # transformers configuration with the new sizes
    cuts: list[Cut]  # what got smaller


def shrink(masked: Checkpoint, manifest: dict[str, Any], directory: Path, *, uneven: bool = False) -> Shrunk:
    """Cut what was pruned out of a masked model: states, channels, whole blocks.

    The manifest says what was kept; the weights are asked whether the rest really is silent, since cutting what still
    speaks would silently make another model. Patterns that make nothing smaller leave every tensor as it is.

    Args:
        masked: what `compress` wrote.
        manifest: its manifest.
        directory: where they are, for messages.
        uneven: let every layer have sizes of its own. Stock loaders have one number for all: by default layers that
            keep less are cut to the size of the one that keeps most, and hold silent rows of zeros up to there.

    Raises:
        CheckpointError: manifest and weights do not fit together.
    """
    removed = [entry["layer"] for entry in manifest["removed"]]
    layers = manifest["layers"]  # none when only whole blocks or SSMs were removed
    blocks_go = "layer" in manifest["config"]["pattern"].split("+")  # else only their SSM is silent
    _check(masked, removed, blocks_go, layers, directory)
    architecture, sizes = masked.architecture, masked.dimensions
    blocks = architecture.blocks(masked.model)
    aside = removed + [index for index, block in enumerate(blocks) if architecture.mixer(block) is None]
    shrunk = Shrunk(masked.tensors(), masked.config, [])
    for name, total, groups, cut in (
        ("kept", sizes.groups * sizes.d_state, sizes.groups, "cut_states"),
        ("kept_channels", sizes.d_inner, 1, "cut_channels"),
    ):
        kept = [layer.get(name) or list(range(total)) for layer in layers]
        kept = _sized(kept, aside, total, uneven, groups)
        if any(len(numbers) < total for numbers in kept):
            shrunk = _then(shrunk, *getattr(architecture, cut)(shrunk.tensors, shrunk.config, kept))
    if removed and blocks_go:  # no loader has a block without an SSM
        shrunk = _then(shrunk, *architecture.cut_blocks(shrunk.tensors, shrunk.config, removed))
    return shrunk


def _check(
    masked: Checkpoint, removed: Sequence[int], blocks_go: bool, layers: Sequence[dict[str, Any]], directory: Path
) -> None:
    """Ask the weights whether everything the manifest calls pruned is silent."""
    blocks = masked.architecture.blocks(masked.model)
    if layers and len(layers) != len(blocks):
        raise CheckpointError(
            f"The manifest in {directory} speaks of {len(layers)} layers, its model has {len(blocks)}. Compress again."
        )
    changed = "its weights were changed after compressing. Compress again."
    for index, layer in enumerate(layers):
        mixer = masked.architecture.mixer(blocks[index])
        if index in removed or mixer is None:
            continue
        if not masked.architecture.is_masked(mixer, layer["kept"]):
            raise CheckpointError(
                f"Layer {index} of the model in {directory} still uses states the manifest calls pruned; {changed}"
            )
        channels = layer.get("kept_channels")
        if channels is not None and not masked.architecture.are_channels_masked(mixer, channels):
            raise CheckpointError(
                f"Layer {index} of the model in {directory} still uses channels the manifest calls pruned; {changed}"
            )
    for index in removed:
        if index >= len(blocks) or not _is_silent(masked.architecture, blocks[index], blocks_go):
            raise CheckpointError(
                f"Layer {index} of the model in {directory} is not silent although the manifest calls it removed; "
                f"{changed}"
            )


def _is_silent(architecture: Architecture, block: nn.Module, whole: bool) -> bool:
    """Whether a block adds nothing, or at least its SSM does not."""
    return architecture.is_removed(block) if whole else architecture.is_masked(architecture.mixer(block), [])


def _sized(kept: list[list[int]], removed: Sequence[int], total: int, uneven: bool, groups: int = 1) -> list[list[int]]:
    """The numbers that are cut out for good; those of layers without a mixer do not matter and follow the others."""
    most = max((len(numbers) for index, numbers in enumerate(kept) if index not in removed), default=total) // groups
    whole, sized = total // groups, []
    for index, numbers in enumerate(kept):
        filled = []
        for block in (range(group * whole, (group + 1) * whole) for group in range(groups)):
            own = [number for number in numbers if number in block]
            if index in removed:
                own = list(block)[:most]
            elif not uneven:  # filled up with silent ones
                silent = sorted(set(block) - set(own))
                own = sorted(own + silent[: most - len(own)])
            filled += own
        sized.append(filled)
    return sized


def _then(before: Shrunk, tensors: dict[str, torch.Tensor], config: Any, cuts: Sequence[Cut]) -> Shrunk:
    """What is left after one more cut; a tensor cut twice is listed once, from its first size to its last."""
    merged = {cut.name: cut for cut in before.cuts}
    for cut in cuts:
        first = merged[cut.name].before if cut.name in merged else cut.before
        merged[cut.name] = Cut(cut.name, first, cut.after)
    return Shrunk(tensors, config, list(merged.values()))
