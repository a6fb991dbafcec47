"""The one ridge solver: least squares from second moments, with a little on their diagonal.

A moment sum x x' says nothing about directions that the calibration text never took. A ridge, a part of the mean
diagonal, pulls the answer there to nothing (or, where the caller solves for a change, to what was there before).
"""

from __future__ import annotations

import torch

from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.runtime.errors import CalibrationError

RIDGE = 1e-4  # times the mean diagonal, for moments of what linear maps read


def ridged(moment: torch.Tensor, part: float = RIDGE) -> torch.Tensor:
    """A second moment (n, n) with a little on its diagonal, in float64.

    Args:
        moment: sum of x x' over tokens.
        part: of the mean diagonal.

    Raises:
        CalibrationError: it is not finite.
    """
    moment = check_finite(moment).double()
    mean = moment.diagonal().mean()
    # inputs that are zero everywhere: any positive ridge leaves their weights at zero
    ridge = part * mean if mean > 0 else torch.ones((), dtype=moment.dtype, device=moment.device)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def factor(matrix: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of a ridged moment, lower triangular.

    Rounding can leave a moment of very little text indefinite by more than its ridge: then more is added, ten times as
    much each time, and what the text cannot determine stays nearer to what it was.

    Raises:
        CalibrationError: it is not positive definite however much is added.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    extra = torch.finfo(matrix.dtype).eps * matrix.diagonal().abs().max()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(12):
        if not failed:
            return lower
        lower, failed = torch.linalg.cholesky_ex(matrix + extra * eye)
        extra = extra * 10
    if failed:
        raise CalibrationError(
            "The second moments of a layer are not positive definite: the calibration text says too little. Give more "
            "text, of more than one kind."
        )
    return lower


def solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X with `matrix` X = `right` (n, k), for a ridged moment (n, n)."""
    return torch.cholesky_solve(right, factor(matrix))


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a ridged moment."""
    return torch.cholesky_inverse(factor(matrix))


def fit(cross: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The linear map of x that comes closest to a target: W = (sum t x') (sum x x' + ridge)^-1.

    Args:
        cross: (out, in) sum of t x' over tokens.
        moment: (in, in) sum of x x' over tokens.

    Returns:
        (out, in) float64.
    """
    return solve(ridged(moment), cross.t().double()).t()


def refit(weight: torch.Tensor, moment: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The weight on the kept inputs that comes closest to the whole one: least squares over the calibration tokens.

    Args:
        weight: (out, in).
        moment: (in, in) sum of x x' over tokens.
        kept: inputs that stay.

    Returns:
        (out, K) float64.
    """
    index = torch.as_tensor(list(kept), device=moment.device)
    cross = weight.to(moment) @ moment[:, index]  # (out, K): sum of (W x) x_kept'
    return fit(cross, moment[index][:, index])
