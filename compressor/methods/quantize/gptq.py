"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): round column by column, and let the columns on the right make up.

It is SparseGPT's sweep with another rule: a column becomes its nearest numbers on the grid. What was pruned stays zero,
and what the columns before it would have it take over goes to those behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssmc.compressor.calibration.placement import computing
from ssmc.compressor.methods.quantize.grid import DIGITS, Grid, fit_grid
from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.methods.weights.sweep import DAMPING, inverse_factor, sweep, without_dead_inputs
from ssmc.runtime.quantized import GridShape, Quantized


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

    Inputs are visited from the one with the largest second moment to the smallest (GPTQ's "act-order"), with grids
    fitted beforehand to the weights as they were ("static groups"): so no file needs to know the order.

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
    diagonal = H.diagonal()
    grid = fit_grid(before, shape, diagonal, digits)
    order = diagonal.argsort(descending=True, stable=True)
    factor, _ = inverse_factor(without_dead_inputs(H)[order][:, order], damping)
    columns = before.t()[order].clone(memory_format=torch.contiguous_format)  # (in, out)
    sweep(columns, factor.to(columns.dtype), _Rounding(grid, order.tolist(), columns != 0))
    after = torch.empty_like(columns)
    after[order] = columns
    return grid.quantized(after.t())
