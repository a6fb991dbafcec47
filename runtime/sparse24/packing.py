"""2:4 matrices in the space of their values: half of the numbers, and two 2-bit positions for every group of four.

A group is four consecutive inputs of one output: four neighbours in a row of a weight (out, in). For float16 and
bfloat16 the two tensors take 0.5 + 1/16 = 0.5625 of the matrix. The layout is ssmc's own: rows stay rows, so that a
few lines of any array library read it. What tensor cores want is a permutation of it that differs from one backend to
the next, which torch makes when a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP, KEPT = 4, 2


@dataclass(frozen=True)
class Packed24:
    """A 2:4 matrix (out, in), packed.

    Attributes:
        values: (out, in / 2) the two kept numbers of every group, in the order of their positions.
        indices: (out, ceil(in / 8)) uint8; four bits a group, even groups low: the first position, then the second.
    """

    values: torch.Tensor
    indices: torch.Tensor


def is_24(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive entries along the last axis at most two differ from zero."""
    if weight.dim() != 2 or weight.shape[1] % GROUP or not weight.numel():
        return False
    return int((weight != 0).view(-1, GROUP).sum(1).max()) <= KEPT


def pack24(weight: torch.Tensor) -> Packed24:
    """Pack a 2:4 matrix; `unpack24` gives every number back exactly, negative zeros as zeros.

    Positions rise inside a group. Where fewer than two numbers differ from zero, the first free positions fill up.

    Args:
        weight: (out, in), any dtype.

    Raises:
        ValueError: the matrix is not 2:4.
    """
    if not is_24(weight):
        raise ValueError(f"a matrix of shape {tuple(weight.shape)} is not 2:4 along its inputs")
    groups = weight.view(weight.shape[0], -1, GROUP)  # (out, in / 4, 4)
    first = torch.argsort((groups == 0).to(torch.uint8), dim=-1, stable=True)  # what differs from zero, then the rest
    positions = first[..., :KEPT].sort(dim=-1).values  # (out, in / 4, 2)
    values = groups.gather(-1, positions).flatten(1)
    nibbles = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)  # (out, in / 4)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return Packed24(values, nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def unpack24(packed: Packed24) -> torch.Tensor:
    """The matrix (out, in) that was packed.

    Raises:
        ValueError: the two tensors do not belong together, or the positions of a group do not rise.
    """
    values, indices = packed.values, packed.indices
    if values.dim() != 2 or values.shape[1] % KEPT:
        raise ValueError(f"values of shape {tuple(values.shape)} are no pairs")
    out, count = values.shape[0], values.shape[1] // KEPT  # groups a row
    if indices.dtype != torch.uint8 or indices.shape != (out, -(-count // 2)):
        raise ValueError(f"indices of shape {tuple(indices.shape)}, {indices.dtype} do not go with the values")
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(1)[:, :count].long()
    positions = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)  # (out, in / 4, 2)
    if not bool((positions[..., 0] < positions[..., 1]).all()):
        raise ValueError("the two positions of a group do not rise")
    groups = values.new_zeros(out, count, GROUP)
    return groups.scatter_(-1, positions, values.view(out, count, KEPT)).flatten(1)
