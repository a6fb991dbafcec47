"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): round column by column, and let the columns on the right make up.

It is SparseGPT's sweep with another rule: a column becomes its nearest numbers on the grid. What was pruned stays zero,
and what the columns before it would have it take over goes to those behind it.

Which codes come out depends on the order of the inputs, and no order is the best for every output. So codes of few bits
are found in several, each output keeps those that cost it least, and `descend` goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssmc.compressor.calibration.placement import computing
from ssmc.compressor.methods.quantize.descent import Descent
from ssmc.compressor.methods.quantize.grid import DIGITS, Grid, fit_grid
from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.methods.weights.sweep import DAMPING, inverse_factor, sweep, without_dead_inputs
from ssmc.runtime.quantized import GridShape, Quantized

FEW_BITS = 4  # up to which it pays to look on after one sweep


@dataclass(frozen=True)
class _Rounding:
    """The rule of the sweep."""

    grid: Grid
    order: list[int]  # the input that stands at each place
    kept: torch.Tensor  # (in, out), by place: False where it was pruned
    span: int = 1

    def begin(self, columns: torch.Tensor, pivots: torch.Tensor, start: int) -> None:
        """The grid is known before the sweep."""

    def new(self, column: torch.Tensor, number: int) -> torch.Tensor:
        """The nearest numbers of the grid."""
        group = self.order[number] // self.grid.shape.group
        return self.grid.nearest(column, group).masked_fill(~self.kept[number], 0)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    shape: GridShape,
    digits: int = DIGITS,
    damping: float = DAMPING,
) -> Quantized:
    """Quantise a linear layer.

    Grids are fitted beforehand to the weights as they were ("static groups"), so no file needs to know the order in
    which inputs were visited. Codes of 8 bits lose so little that one order has to do.

    Args:
        weight: (out, in), any floating type; not modified.
        hessian: (in, in), `SecondMoment.total` or any positive multiple of it.
        shape: of the grid.
        digits: binary digits of the scales.
        damping: first value tried, in units of H's mean diagonal.

    Raises:
        CalibrationError: H is not finite, or no damping makes it positive definite.
    """
    before = computing(weight.detach())
    H = check_finite(hessian).to(before.device, torch.float64)
    grid = fit_grid(before, shape, H.diagonal(), digits)
    orders = visiting_orders(H.diagonal())
    if shape.bits > FEW_BITS:
        return grid.quantized(swept(before, H, grid, orders[0], damping))
    descent = Descent(before, H, damping)
    found = [swept(before, H, grid, order, damping) for order in orders]
    errors = torch.stack([descent.errors(numbers) for numbers in found])  # (orders, out)
    best = errors.argmin(0)
    numbers = torch.stack(found)[best, torch.arange(len(before), device=best.device)]
    return descent.descend(grid, numbers, digits)


def visiting_orders(diagonal: torch.Tensor) -> list[torch.Tensor]:
    """Orders of the inputs: from the largest second moment down (GPTQ's "act-order"), as they are, and both reversed.

    Args:
        diagonal: (in,) of H.
    """
    falling = diagonal.argsort(descending=True, stable=True)
    natural = torch.arange(len(diagonal), device=diagonal.device)
    return [falling, natural, falling.flip(0), natural.flip(0)]


def swept(weight: torch.Tensor, H: torch.Tensor, grid: Grid, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The weight (out, in) rounded to the numbers of a grid, input after input in this order."""
    factor, _ = inverse_factor(without_dead_inputs(H)[order][:, order], damping)
    columns = weight.t()[order].clone(memory_format=torch.contiguous_format)  # (in, out)
    sweep(columns, factor.to(columns.dtype), _Rounding(grid, order.tolist(), columns != 0))
    after = torch.empty_like(columns)
    after[order] = columns
    return after.t()
