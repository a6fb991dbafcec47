"""Weights in few bits: codes with a scale and a zero point for each group of inputs, in memory and on disk.

A code q, a whole number, stands for the weight s (q - z). Symmetric grids have codes -2^(b-1) .. 2^(b-1) - 1 and z = 0;
asymmetric ones 0 .. 2^b - 1 and a whole z among them. Zero is always on the grid, so what was pruned stays pruned.

A masked model holds these weights as ordinary numbers, so that everything that reads models reads it; the codes lie in
a file beside them, so that exports can pack the very same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.later import torch

FILE = "quantized.codes"
"""A safetensors file; loaders that take every *.safetensors of a folder for weights must not see it as one."""

_KEY = "ssmc.quantized"  # of its metadata, in JSON


@dataclass(frozen=True)
class GridShape:
    """What numbers weights may be.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; it divides them.
        symmetric: whether there are no zero points.
    """

    bits: int
    group: int
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.lowest + 2**self.bits - 1


@dataclass(frozen=True)
class Quantized:
    """One weight (out, in) in few bits.

    Attributes:
        shape: what its numbers may be.
        codes: (out, in), int8 where it is symmetric, uint8 else.
        scale: (out, groups) float32, of so few digits that scale times code is exact in the type that is stored; not
            always positive.
        zero: (out, groups) uint8; None where it is symmetric.
    """

    shape: GridShape
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The numbers that the codes stand for, (out, in) float32."""
        codes = self.codes.float().unflatten(1, (-1, self.shape.group))
        codes = codes if self.zero is None else codes - self.zero.float()[..., None]
        return (self.scale[..., None] * codes).flatten(1)

    def expanded_scale(self) -> torch.Tensor:
        """The scale of every weight, (out, in)."""
        return self.scale.repeat_interleave(self.shape.group, dim=1)

    def expanded_zero(self) -> torch.Tensor:
        """The zero point of every weight, (out, in)."""
        if self.zero is None:
            return torch.zeros_like(self.codes)
        return self.zero.repeat_interleave(self.shape.group, dim=1)

    @property
    def packed_bits(self) -> int:
        """Bits of codes, scales in half precision and zero points, packed."""
        zeros = 0 if self.zero is None else self.zero.numel() * self.shape.bits
        return self.codes.numel() * self.shape.bits + self.scale.numel() * 16 + zeros


def write_quantized(folder: Path, weights: Mapping[str, Quantized]) -> Path:
    """Write codes, scales and zero points of weights, by the names of their tensors; same input, same bytes."""
    from safetensors.torch import save_file

    tensors, about = {}, {}
    for name, weight in sorted(weights.items()):
        tensors[f"{name}.codes"] = weight.codes.contiguous()
        tensors[f"{name}.scale"] = weight.scale.contiguous()
        if weight.zero is not None:
            tensors[f"{name}.zero"] = weight.zero.contiguous()
        about[name] = {"bits": weight.shape.bits, "group": weight.shape.group, "symmetric": weight.shape.symmetric}
    save_file(tensors, folder / FILE, metadata={_KEY: json.dumps(about)})
    return folder / FILE


def read_quantized(folder: Path) -> dict[str, Quantized]:
    """Read what `write_quantized` wrote; nothing where there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: _read(tensors, name, entry) for name, entry in about.items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Run `ssmc compress` again.") from error


def _read(tensors: Mapping[str, torch.Tensor], name: str, entry: Mapping[str, Any]) -> Quantized:
    shape = GridShape(int(entry["bits"]), int(entry["group"]), bool(entry["symmetric"]))
    codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
    zero = None if shape.symmetric else tensors[f"{name}.zero"]
    if codes.dim() != 2 or scale.shape != (codes.shape[0], codes.shape[1] // max(1, shape.group)):
        raise ValueError(f"{name} has codes {tuple(codes.shape)} and scales {tuple(scale.shape)}")
    if codes.shape[1] % shape.group or (zero is not None and zero.shape != scale.shape):
        raise ValueError(f"the groups of {name} do not fit its inputs")
    return Quantized(shape, codes, scale, zero)
