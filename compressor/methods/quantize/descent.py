"""Codes and scales of a matrix, better and better: what GPTQ leaves is no minimum of the error that it is judged by.

The rows w of a weight are independent problems: min (w - n)' H (w - n) over numbers n = s q, with a code q for each
input and a scale s for each group of inputs. Given the codes, the scales are a least-squares problem with as many
unknowns as there are groups. Given the scales and all other codes, the best code of an input is the rounded minimum of
a parabola. Both in turn can only lower the error.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ssmc.compressor.methods.quantize.grid import Grid, nearest_scale
from ssmc.compressor.methods.weights.sweep import BLOCK, without_dead_inputs
from ssmc.runtime.quantized import Quantized

ROUNDS = 3


class Descent:
    """The problem of one weight.

    Args:
        weight: (out, in) as it was, float32 or float64; zeros stay.
        hessian: (in, in) sum of x x', float64.
        damping: added to its diagonal, in units of its mean.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, damping: float):
        eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        self.hessian = (without_dead_inputs(hessian) + damping * eye).to(weight.dtype)
        self.weight = weight

    def errors(self, numbers: torch.Tensor) -> torch.Tensor:
        """(out,) the error of each row of the numbers (out, in) in its place."""
        change = self.weight - numbers
        return ((change @ self.hessian) * change).sum(1)

    def descend(self, grid: Grid, numbers: torch.Tensor, digits: int, rounds: int = ROUNDS) -> Quantized:
        """Lower the error of numbers on a grid.

        Args:
            grid: what they are on; its zero points stay.
            numbers: (out, in).
            digits: binary digits of the scales.
            rounds: scales and codes in turn, so often.
        """
        codes, errors = grid.codes(numbers), self.errors(numbers)
        for _ in range(rounds):
            moved = replace(grid, scale=nearest_scale(self.best_scales(grid, codes), digits))
            found = self.best_codes(moved, codes)
            now = self.errors(moved.numbers(found))
            better = (now < errors)[:, None]  # rounded scales can make a row worse
            errors = torch.where(better[:, 0], now, errors)
            codes = torch.where(better, found, codes)
            grid = replace(grid, scale=torch.where(better, moved.scale, grid.scale))
        return grid.stored(codes)

    def best_scales(self, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
        """The scales (out, groups) with the least error for these codes; those of the grid where all codes are zero."""
        group = grid.shape.group
        steps = codes - grid.zero.repeat_interleave(group, 1)  # (out, in) what scales multiply
        right = _by_group(steps * (self.weight @ self.hessian), group)  # (out, groups)
        matrix = torch.empty(*right.shape, right.shape[1], dtype=right.dtype, device=right.device)
        for number in range(right.shape[1]):
            here = slice(number * group, (number + 1) * group)
            matrix[:, number] = _by_group(steps * (steps[:, here] @ self.hessian[here]), group)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        idle = diagonal == 0
        diagonal += idle.to(diagonal)
        found = torch.linalg.solve(matrix.double(), right.double()[..., None])[..., 0].to(right)
        return torch.where(idle | (found * grid.scale <= 0), grid.scale, found)

    def best_codes(self, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
        """Each code in turn at its best, given all others as they are then: once over all inputs."""
        group, kept = grid.shape.group, self.weight != 0
        numbers, found = grid.numbers(codes), codes.clone()
        for start in range(0, codes.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            inside = self.hessian[block, block]
            pull = ((self.weight - numbers) @ self.hessian[:, block]).t().contiguous()  # (block, out), half the slope
            for j in range(len(pull)):
                i = start + j
                scale, zero = grid.scale[:, i // group], grid.zero[:, i // group]
                code = grid.codes_of(numbers[:, i] + pull[j] / inside[j, j], i // group)
                code = torch.where(kept[:, i], code, zero)
                change = scale * (code - zero) - numbers[:, i]
                pull[j + 1 :].addr_(inside[j, j + 1 :], change, alpha=-1)
                numbers[:, i] += change
                found[:, i] = code
        return found


def _by_group(values: torch.Tensor, group: int) -> torch.Tensor:
    """Sums over the inputs of each group, (out, groups)."""
    return values.unflatten(1, (-1, group)).sum(-1)
