"""From a masked model to a physically smaller one: what is silent is cut out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.manifest import BLOCK, MaskedManifest
from ssmc.runtime.models.architectures.experts import Experts
from ssmc.runtime.models.architectures.residual import cut_width, silent_places
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.checkpoints.deferred import real
from ssmc.runtime.models.families import CHANNEL, STATE, Architecture, Cut


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, not yet on disk."""

    tensors: dict[str, torch.Tensor]  # by transformers' names, in their stored dtypes
    config: Any  # transformers configuration with the new sizes
    cuts: list[Cut]  # what got smaller


def shrink(masked: Checkpoint, manifest: MaskedManifest, *, uneven: bool = False) -> Shrunk:
    """Cut what was pruned out of a masked model: states, channels, whole blocks.

    The manifest says what was kept; the weights are asked whether the rest really is silent, since cutting what still
    speaks would silently make another model. Patterns that make nothing smaller leave every tensor as it is.

    Args:
        masked: what `compress` wrote.
        manifest: its manifest.
        uneven: let every layer have sizes of its own. Stock loaders have one number for all: by default layers that
            keep less are cut to the size of the one that keeps most, and hold silent rows of zeros up to there.

    Raises:
        CheckpointError: manifest and weights do not fit together.
    """
    removed = [removal.layer for removal in manifest.removed]
    blocks = [removal.layer for removal in manifest.removed if removal.part == BLOCK]
    layers = manifest.layers  # none when only whole blocks or SSMs were removed
    _check(masked, manifest)
    architecture, sizes = masked.architecture, masked.dimensions
    modules = enumerate(architecture.blocks(masked.model))
    aside = removed + [index for index, block in modules if architecture.mixer(block) is None]
    shrunk = Shrunk(masked.tensors(), masked.config, [])
    for name, total, groups, dimension in (
        ("kept", sizes.groups * sizes.d_state, sizes.groups, STATE),
        ("kept_channels", sizes.d_inner, 1, CHANNEL),
    ):
        kept = [list(getattr(layer, name) or range(total)) for layer in layers]
        kept = _sized(kept, aside, total, uneven, groups)
        if any(len(numbers) < total for numbers in kept):
            shrunk = _then(shrunk, *architecture.cut(shrunk.tensors, shrunk.config, dimension, kept))
    shrunk = _without_units(masked, manifest, shrunk, set(removed))
    if manifest.width is not None:
        kept_width = int(manifest.width["kept"])
        shrunk = _then(shrunk, *cut_width(architecture, masked.model, shrunk.tensors, shrunk.config, kept_width))
    if blocks:  # a block without an SSM stays: no loader has one
        shrunk = _then(shrunk, *architecture.cut_blocks(shrunk.tensors, shrunk.config, blocks))
    return shrunk


def _without_units(masked: Checkpoint, manifest: MaskedManifest, shrunk: Shrunk, removed: set[int]) -> Shrunk:
    """Neurons, query heads and such cut out of all layers that have some; of a removed layer any that are there."""
    architecture, layers = masked.architecture, manifest.layers
    blocks = architecture.blocks(masked.model)
    for part in architecture.units:
        if isinstance(part, Experts):  # cut out when the model was compressed
            continue
        having = [index for index, block in enumerate(blocks) if part.inside(block) is not None]
        kept = {i: layers[i].kept_units[part.kind] for i in having if layers and part.kind in layers[i].kept_units}
        if not kept:
            continue
        some = next(iter(kept.values()))
        if any(len(units) != len(some) for units in kept.values()) or set(having) - set(kept) - removed:
            raise CheckpointError(f"The layers of the model in {masked.source} keep different numbers of {part.kind}.")
        named = {architecture.block_prefix(i): kept.get(i, some) for i in having}
        shrunk = _then(shrunk, *part.cut(shrunk.tensors, shrunk.config, named))
    return shrunk


def _check(masked: Checkpoint, manifest: MaskedManifest) -> None:
    """Ask the weights whether everything the manifest calls pruned is silent."""
    architecture, where = masked.architecture, masked.source
    blocks, layers = architecture.blocks(masked.model), manifest.layers
    if layers and len(layers) != len(blocks):
        raise CheckpointError(
            f"The manifest in {where} has {len(layers)} layers, its model has {len(blocks)}. Compress again."
        )
    changed = "its weights were changed after compressing. Compress again."
    removed = {removal.layer for removal in manifest.removed}
    for index, layer in enumerate(layers):
        mixer = architecture.mixer(blocks[index])
        if index in removed or mixer is None:
            continue
        for dimension, kept, what in ((STATE, layer.kept, "states"), (CHANNEL, layer.kept_channels, "channels")):
            with masked.holding(blocks[index]):
                silent = kept is None or architecture.is_masked(architecture.mixer(blocks[index]), dimension, kept)
            if not silent:
                raise CheckpointError(
                    f"Layer {index} of the model in {where} still uses {what} the manifest calls pruned; {changed}"
                )
    _check_units(masked, manifest, removed)
    _check_width(masked, manifest)
    for removal in manifest.removed:
        index, whole = removal.layer, removal.part == BLOCK
        if index < len(blocks):
            with masked.holding(blocks[index]):
                if _is_silent(architecture, blocks[index], whole):
                    continue
        raise CheckpointError(
            f"Layer {index} of the model in {where} is not silent although the manifest calls it removed; {changed}"
        )


def _check_units(masked: Checkpoint, manifest: MaskedManifest, removed: set[int]) -> None:
    """Ask the weights whether the units that the manifest calls pruned are silent."""
    for index, (block, layer) in enumerate(
        zip(masked.architecture.blocks(masked.model), manifest.layers, strict=False)
    ):
        for part in masked.architecture.units if index not in removed else ():
            module, kept = part.inside(block), layer.kept_units.get(part.kind)
            if module is None or kept is None or isinstance(part, Experts):
                continue
            if not kept or list(kept) != sorted(set(kept) & set(part.numbers(module, masked.config))):
                raise CheckpointError(
                    f"The manifest in {masked.source} names {part.kind} that layer {index} of the model does not have. "
                    "Compress again."
                )
            with masked.holding(block):
                silent = part.is_masked(cast(nn.Module, part.inside(block)), kept)
            if not silent:
                raise CheckpointError(
                    f"Layer {index} of the model in {masked.source} still uses {part.kind} the manifest calls pruned; "
                    "its weights were changed after compressing. Compress again."
                )


def _check_width(masked: Checkpoint, manifest: MaskedManifest) -> None:
    """Ask the weights whether nothing is written to the coordinates of the stream that the manifest calls pruned."""
    if manifest.width is None:
        return
    kept, d_model, tensors = manifest.width.get("kept"), masked.dimensions.d_model, masked.tensors()
    if not isinstance(kept, int) or not 0 < kept <= d_model:
        raise CheckpointError(
            f"The manifest in {masked.source} keeps {kept} of a d_model of {d_model}. Compress again."
        )
    for place in silent_places(masked.architecture, masked.model, kept, d_model):
        if bool(real(tensors[place.name]).index_select(place.axis, place.index).any()):
            raise CheckpointError(
                f"{place.name} of the model in {masked.source} still writes to coordinates of the residual stream that "
                "the manifest calls pruned; its weights were changed after compressing. Compress again."
            )


def _is_silent(architecture: Architecture, block: nn.Module, whole: bool) -> bool:
    """Whether a block adds nothing, or at least its SSM does not."""
    return architecture.is_removed(block) if whole else architecture.is_masked(architecture.mixer(block), STATE, [])


def _sized(kept: list[list[int]], removed: Sequence[int], total: int, uneven: bool, groups: int = 1) -> list[list[int]]:
    """The numbers that are cut out for good; those of layers without a mixer do not matter and follow the others."""
    staying = [numbers for index, numbers in enumerate(kept) if index not in removed]
    widest = max(staying, key=len, default=list(range(total)))  # whose heads are as wide as those of all
    most = len(widest) // groups
    whole, sized = total // groups, []
    for index, numbers in enumerate(kept):
        filled = []
        for block in (range(group * whole, (group + 1) * whole) for group in range(groups)):
            own = [number for number in (widest if index in removed else numbers) if number in block]
            if not uneven:  # filled up with silent ones
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
