"""The codes of a compressed model as blocks of llama.cpp: the same numbers, and the same scale for every 32 of them.

A block of type Q4_0 holds a scale in float16 and 32 codes of -8 .. 7, one of type Q8_0 codes of -128 .. 127. Groups of
inputs that are multiples of 32 fall into whole blocks, so nothing is quantised a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import torch

from ssmc.exporters.gguf.parts import Entry
from ssmc.runtime.quantized import Quantized

CODES = "codes"  # how a user asks for them
BLOCK = 32
OFF = 2.0**-11
"""How far a number may be off, relative to itself: a scale times a factor that llama.cpp wants may be rounded."""


def with_scales(
    layout: Any, config: Any, sizes: Any, tensors: Mapping[str, torch.Tensor], codes: Mapping[str, Quantized]
) -> Iterator[tuple[Entry, torch.Tensor | None]]:
    """The tensors of a file, and the scale of every number of those that are codes.

    What a layout does to a weight (factors, another order of rows) it does to the scales in its place as well.
    """
    if not codes:
        yield from ((entry, None) for entry in layout.entries(config, sizes, tensors))
        return
    scales = {name: code.expanded_scale().half() for name, code in codes.items()}
    values = {name: code.weight() for name, code in codes.items()}
    pairs = zip(
        layout.entries(config, sizes, {**tensors, **values}),
        layout.entries(config, sizes, {**tensors, **scales}),
        strict=True,
    )
    for entry, scaled in pairs:
        same = entry.tensor.shape == scaled.tensor.shape and torch.equal(entry.tensor.float(), scaled.tensor.float())
        yield entry, None if same else scaled.tensor.float()


def blocks(values: torch.Tensor, scale: torch.Tensor) -> tuple[gguf.GGMLQuantizationType, np.ndarray] | None:
    """The type and the bytes of a matrix (out, in) of codes; None where its groups are no whole blocks.

    Args:
        values: scale times code.
        scale: (out, in), of each number.
    """
    rows, inputs = values.shape
    if inputs % BLOCK:
        return None
    grouped = scale.view(rows, -1, BLOCK)
    if not bool((grouped == grouped[..., :1]).all()):
        return None
    codes = (values.float().view(rows, -1, BLOCK) / grouped).round().to(torch.int16).numpy()
    d = grouped[..., :1].half().numpy().view(np.uint8)  # (rows, blocks, 2)
    if codes.min() >= -8 and codes.max() <= 7:
        unsigned = (codes + 8).astype(np.uint8)
        packed = unsigned[..., : BLOCK // 2] | (unsigned[..., BLOCK // 2 :] << 4)
        return gguf.GGMLQuantizationType.Q4_0, np.concatenate([d, packed], axis=-1).reshape(rows, -1)
    packed = codes.astype(np.int8).view(np.uint8)
    return gguf.GGMLQuantizationType.Q8_0, np.concatenate([d, packed], axis=-1).reshape(rows, -1)
