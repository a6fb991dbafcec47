"""The codes of a quantised artefact on their way into an export: cut as its weights are, and proven to be them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ssmc.exporters.cutting import Shrunk
from ssmc.exporters.source import Source
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import BLOCK
from ssmc.runtime.models.checkpoints.deferred import real
from ssmc.runtime.quantized import Quantized, read_quantized


def require_codes(source: Source, shrunk: Shrunk, format: str) -> dict[str, Quantized]:
    """The codes of what is exported, by the names of its tensors.

    Raises:
        UsageError: the model was not quantised, or layers of different widths are filled up.
        CheckpointError: they are not those of the weights.
    """
    codes = codes_of(source, shrunk)
    if not codes:
        raise UsageError(
            f"{source.checkpoint.source} holds no codes to write as {format}. Compress with --quantize w8 or w4 first."
        )
    return codes


def codes_of(source: Source, shrunk: Shrunk) -> dict[str, Quantized]:
    """As `require_codes`; none where the model was not quantised."""
    if source.manifest is None or source.manifest.quantized is None:
        return {}
    return {
        name: _cut(code, shrunk.tensors[name], name)
        for name, code in _numbered_anew(source)
        if name in shrunk.tensors  # a tied head has no tensor of its own
    }


def _numbered_anew(source: Source) -> Iterator[tuple[str, Quantized]]:
    """All codes of an artefact by the names that their tensors have when removed layers are gone."""
    assert source.manifest is not None
    removed = {removal.layer for removal in source.manifest.removed if removal.part == BLOCK}
    prefix = source.checkpoint.architecture.block_prefix
    layers = range(source.checkpoint.dimensions.n_layer)
    number = {prefix(layer): prefix(layer - sum(gone < layer for gone in removed)) for layer in layers}
    for name, code in read_quantized(source.checkpoint.directory).items():
        old = next((old for old in number if name.startswith(old)), "")
        yield number.get(old, "") + name[len(old) :], code


def _cut(code: Quantized, weight: torch.Tensor, name: str) -> Quantized:
    """The codes of those outputs that are left in a weight (out, in): what was pruned of them is cut out by now.

    Groups were made of the inputs that stay, so these fit. Outputs are matched by their numbers, in their order.

    Raises:
        UsageError: the weight has more inputs.
        CheckpointError: the numbers are others.
    """
    held, stored = real(weight).float(), code.weight()
    if held.shape[1] > stored.shape[1]:
        raise UsageError(
            f"{name} is filled up with zeros to the width of other layers, so its groups of inputs do not fit any "
            "more. Compress all layers to one width, or use --format onnx, which takes each as it is."
        )
    rows: list[int] = []
    if held.shape == stored.shape and torch.equal(held, stored):
        return code
    if held.shape[1] == stored.shape[1]:
        at = 0
        for row in held:
            while at < len(stored) and not torch.equal(row, stored[at]):
                at += 1
            rows += [at] if at < len(stored) else []
            at += 1
    if len(rows) < len(held):
        raise CheckpointError(f"The codes are not those of {name}, which was changed after compressing. Do it again.")
    zero = None if code.zero is None else code.zero[rows]
    return Quantized(code.shape, code.codes[rows], code.scale[rows], zero)
