"""Fitting grids: scale and zero point of every group of inputs of every output, see `runtime.quantized`.

Scales have so few binary digits that scale times code is exact in the type that a model is stored in. So the masked
model holds the very numbers of its codes, and any software that multiplies them out arrives at the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ssmc.runtime.quantized import GridShape, Quantized

SHRINK = tuple(1 - step / 50 for step in range(31))  # parts of the range that are tried: the ends may be clipped
SMALLEST = 2.0**-16  # scale; the last of its digits is still one of float16
DIGITS = 11  # of a scale, at most: those of float16
_DIGITS = {torch.float16: 11, torch.bfloat16: 8}  # of numbers of these types


@dataclass(frozen=True)
class Grid:
    """The numbers that the weights of one matrix can be.

    Attributes:
        shape: what kind.
        scale: (out, groups), not zero. Negative where that gives the group's larger end the lowest code, which lies
            further out than the highest: formats without zero points take it, since all they do is to multiply.
        zero: (out, groups), whole numbers; zeros where it is symmetric.
    """

    shape: GridShape
    scale: torch.Tensor
    zero: torch.Tensor

    def nearest(self, column: torch.Tensor, group: int) -> torch.Tensor:
        """The nearest numbers of a column (out,) whose input is of this group."""
        return _nearest(column, self.scale[:, group], self.zero[:, group], self.shape)

    def codes_of(self, column: torch.Tensor, group: int) -> torch.Tensor:
        """The codes of those, whole numbers in the type of the column."""
        return _codes(column, self.scale[:, group], self.zero[:, group], self.shape)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes of a weight (out, in), whole numbers in its type."""
        return _codes(_grouped(weight, self.shape), self.scale[..., None], self.zero[..., None], self.shape).flatten(1)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes (out, in) stand for."""
        return (self.scale[..., None] * (_grouped(codes, self.shape) - self.zero[..., None])).flatten(1)

    def stored(self, codes: torch.Tensor) -> Quantized:
        """Codes (out, in) of this grid, as they are kept."""
        whole = torch.int8 if self.shape.symmetric else torch.uint8
        zero = None if self.shape.symmetric else self.zero.to("cpu", torch.uint8)
        return Quantized(self.shape, codes.to("cpu", whole), self.scale.to("cpu", torch.float32), zero)

    def quantized(self, weight: torch.Tensor) -> Quantized:
        """A weight (out, in) by its nearest codes."""
        return self.stored(self.codes(weight))


def spanning_grid(weight: torch.Tensor, shape: GridShape, digits: int = DIGITS) -> Grid:
    """The grid from the smallest to the largest weight of every group: what rounding to nearest usually means.

    Args:
        weight: (out, in).
        shape: what kind of grid.
        digits: binary digits of the scales.
    """
    return _spanning(_grouped(weight, shape), shape, digits)


def fit_grid(weight: torch.Tensor, shape: GridShape, importance: torch.Tensor, digits: int = DIGITS) -> Grid:
    """The grid with the smallest squared error of rounding to nearest, among those with a smaller range, of both signs.

    Args:
        weight: (out, in).
        shape: what kind of grid.
        importance: (in,) what the squared error of an input counts.
        digits: binary digits of the scales.
    """
    grouped = _grouped(weight, shape)  # (out, groups, group)
    counts = _grouped(importance.to(weight)[None], shape)
    best, errors = _spanning(grouped, shape, digits), torch.full_like(grouped[..., 0], torch.inf)
    for part in SHRINK:
        span = _spanning(grouped * part, shape, digits)
        for grid in (span, replace(span, scale=-span.scale)) if shape.symmetric else (span,):
            found = _nearest(grouped, grid.scale[..., None], grid.zero[..., None], shape)
            error = ((found - grouped).square() * counts).sum(-1)
            better = error < errors
            errors = torch.where(better, error, errors)
            scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
            best = replace(best, scale=scale, zero=zero)
    return best


def _spanning(grouped: torch.Tensor, shape: GridShape, digits: int) -> Grid:
    if shape.symmetric:
        scale = _rounded(grouped.abs().amax(-1) / (-shape.lowest - 0.5), digits)
        return Grid(shape, scale, torch.zeros_like(scale))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = _rounded((high - low) / shape.highest, digits)
    return Grid(shape, scale, (-low / scale).round().clamp(shape.lowest, shape.highest))


def digits_for(stored: torch.dtype | None, shape: GridShape) -> int:
    """How many digits scales may have so that scale times code is exact in the type a weight is stored in."""
    of_codes = shape.bits - 1 if shape.symmetric else shape.bits
    return max(1, min(DIGITS, _DIGITS.get(stored, 24) - of_codes))  # type: ignore[arg-type]


def nearest_scale(scale: torch.Tensor, digits: int) -> torch.Tensor:
    """Scales rounded to so many binary digits, with their signs; none becomes zero."""
    fraction, exponent = torch.frexp(scale.abs().clamp(min=SMALLEST))
    return torch.ldexp((fraction * 2**digits).round() / 2**digits, exponent).copysign(scale)


def _rounded(scale: torch.Tensor, digits: int) -> torch.Tensor:
    """The next number of so many binary digits, so that nothing is clipped; a group of zeros has some scale, too."""
    fraction, exponent = torch.frexp(scale.clamp(min=SMALLEST))
    return torch.ldexp((fraction * 2**digits).ceil() / 2**digits, exponent)


def _nearest(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, shape: GridShape) -> torch.Tensor:
    return scale * (_codes(weight, scale, zero, shape) - zero)


def _codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, shape: GridShape) -> torch.Tensor:
    return (weight / scale + zero).round().clamp(shape.lowest, shape.highest)


def _grouped(weight: torch.Tensor, shape: GridShape) -> torch.Tensor:
    return weight.unflatten(-1, (-1, shape.group))
