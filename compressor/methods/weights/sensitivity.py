"""How much each layer's module loses: sensitivity-aware sparsity, Eq. 7 of SparseSSM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ssmc.runtime.errors import CalibrationError, UsageError

if TYPE_CHECKING:  # options are checked before torch is loaded
    import torch

ALPHA = 0.04  # the paper's
RANKED = ("in_proj", "out_proj")  # each ranked over the layers on its own; the others get the mean


def sensitivity(hessian: torch.Tensor, size: int) -> float:
    """trace(H) / size.

    Args:
        hessian: (in, in) second moment of the module's inputs, or (D, K, K) for a depthwise conv1d; of the former the
            diagonal alone, (in,), is enough.
        size: number of weights of the module.
    """
    diagonal = hessian if hessian.dim() == 1 else hessian.diagonal(dim1=-2, dim2=-1)
    return float(diagonal.double().sum()) / size


def ramp(sensitivities: Sequence[float], sparsity: float, alpha: float = ALPHA) -> list[float]:
    """Sparsity of one module kind in every layer (Eq. 7).

    The least sensitive layer gets sparsity + alpha, the most sensitive sparsity - alpha, those between them values
    spaced evenly by rank; equal sensitivities share the mean of their ranks. The mean is `sparsity`. A single layer
    gets `sparsity`.

    Args:
        sensitivities: of this module in each layer.
        sparsity: the mean, inside (0, 1).
        alpha: half the width of the ramp; 0 makes all equal.

    Raises:
        UsageError: the ramp leaves (0, 1), or alpha is negative.
        CalibrationError: a sensitivity is not a finite number.
    """
    check_ramp(sparsity, alpha)
    if not all(map(math.isfinite, sensitivities)):
        raise CalibrationError(
            "A layer's sensitivity is not a finite number, so the layers cannot be ranked. "
            "The activations overflow: compute in float32 and check the checkpoint."
        )
    last = len(sensitivities) - 1
    return [sparsity + (alpha * (1 - 2 * rank / last) if last else 0.0) for rank in _ranks(sensitivities)]


def allocate(
    sensitivities: Mapping[str, Sequence[float]], sparsity: float, alpha: float = ALPHA
) -> dict[str, list[float]]:
    """Sparsity of every module in every layer: in_proj and out_proj by their own ramp, all others the mean.

    Args:
        sensitivities: by module name, one per layer.
        sparsity: the mean.
        alpha: half the width of the ramp.

    Raises:
        UsageError, CalibrationError: as `ramp`.
    """
    return {name: ramp(values, sparsity, alpha if name in RANKED else 0.0) for name, values in sensitivities.items()}


def check_ramp(sparsity: float, alpha: float) -> None:
    """Refuse a ramp that leaves (0, 1).

    Raises:
        UsageError: what is wrong and the largest alpha that works.
    """
    room = min(sparsity, 1 - sparsity)
    if room <= 0:
        raise UsageError(f"sparsity {sparsity} does not work: it is the part that is removed, between 0 and 1.")
    if not 0 <= alpha < room:
        raise UsageError(
            f"alpha {alpha:g} does not work with sparsity {sparsity:g}: sparsities from {sparsity - alpha:g} to "
            f"{sparsity + alpha:g} must lie between 0 and 1. Use an alpha of at least 0 and below {room:g}."
        )


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the smallest; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
