"""The sweep that SparseGPT and GPTQ share: change a matrix column by column and let the columns on its right make up.

Notation: W (out, in), H = sum x x' (in, in) over the calibration inputs x. The rows of W are independent problems with
the same H. Columns are visited from left to right; each gets its new value by a rule, and what that changes is taken
over by those to its right by the Optimal Brain Surgeon step

    W[:, j:] -= (W[:, j] - new) / F_jj * F[j, j:],    F upper triangular with F' F = H^-1,

where row j of F is what OBS needs from the inverse of H restricted to the columns j, j + 1, ... A block of columns at a
time, everything to its right is updated by one matrix product (GPTQ, Frantar et al. 2023, algorithm 1).
"""

from __future__ import annotations

from typing import Protocol

import torch

from ssmc.runtime.errors import CalibrationError

BLOCK = 128  # columns whose updates to the right are one matrix product: speed only
DAMPING = 0.01  # added to the diagonal of H, times its mean
_MOST_DAMPING = 100.0
_LEAST_PIVOT = 1e-12  # of the mean diagonal; below it float64 has only rounding left


class Rule(Protocol):
    """What happens to a column when its turn comes.

    Attributes:
        span: how many columns are looked at together before the first of them is changed; blocks are whole spans.
    """

    @property
    def span(self) -> int:
        """Columns that are looked at together."""

    def begin(self, columns: torch.Tensor, pivots: torch.Tensor, start: int) -> None:
        """Look at the columns (span, out) from number `start` on as they are now; F_jj of each is in `pivots`."""

    def new(self, column: torch.Tensor, number: int) -> torch.Tensor:
        """The new value of a column (out,)."""


def sweep(columns: torch.Tensor, factor: torch.Tensor, rule: Rule, block: int = BLOCK) -> None:
    """Change `columns` (in, out) in place, left to right.

    Args:
        columns: W'; what is updated together lies together.
        factor: F, in their type.
        rule: says what a column becomes.
        block: columns updated together, rounded down to whole spans; no matter but of speed and rounding.
    """
    block = max(rule.span, block - block % rule.span)
    for start in range(0, len(columns), block):
        here, right = slice(start, start + block), slice(start + block, None)
        errors = _sweep_block(columns[here], factor[here, here], rule, start)
        columns[right].addmm_(factor[here, right].t(), errors, alpha=-1)


def _sweep_block(columns: torch.Tensor, factor: torch.Tensor, rule: Rule, start: int) -> torch.Tensor:
    """One block, in place; returns its errors (W_ij - new) / F_jj, (block, out), for the columns on its right."""
    pivots = factor.diagonal()
    errors = torch.empty_like(columns)
    for j in range(len(columns)):
        if j % rule.span == 0:
            span = slice(j, j + rule.span)
            rule.begin(columns[span], pivots[span], start + j)
        new = rule.new(columns[j], start + j)
        errors[j] = (columns[j] - new) / pivots[j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        columns[j] = new
    return errors


def without_dead_inputs(H: torch.Tensor) -> torch.Tensor:
    """H in units of its mean diagonal over live inputs; dead ones get 1 (SparseGPT's value, here at any scale of H)."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    scale = diagonal[~dead].mean() if not dead.all() else 1.0
    return H / scale + torch.diag(dead.to(H.dtype))


def inverse_factor(H: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper triangular F with F' F = (H + damping I)^-1, and the damping that was needed.

    Args:
        H: (in, in) float64 with mean diagonal 1, see `without_dead_inputs`.
        damping: first value tried; 10 times as much each time the factorisation fails.

    Raises:
        CalibrationError: no damping makes it positive definite.
    """
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    while damping <= _MOST_DAMPING:
        # H = R R' with R upper triangular is Cholesky from the last column to the first; then F = R^-1, and H is never
        # inverted as a whole
        lower, failed = torch.linalg.cholesky_ex((H + damping * eye).flip(0, 1))
        if not failed and lower.diagonal().min() ** 2 > _LEAST_PIVOT:
            return _inverse_of_upper(lower.flip(0, 1)), damping
        damping = max(10 * damping, 1e-6)
    raise CalibrationError(
        f"The Hessian of a layer is not positive definite even with {_MOST_DAMPING:g} times its mean diagonal added. "
        "It is no sum of x x'; use more calibration text, and report this if it stays."
    )


def _inverse_of_upper(R: torch.Tensor) -> torch.Tensor:
    """R^-1 of an upper triangular matrix by halves: a third of the work of solving against the identity."""
    half = len(R) // 2
    if half < 128:
        return torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    inverse = torch.zeros_like(R)
    inverse[:half, :half] = left = _inverse_of_upper(R[:half, :half])
    inverse[half:, half:] = right = _inverse_of_upper(R[half:, half:])
    inverse[:half, half:] = -(left @ R[:half, half:]) @ right
    return inverse
