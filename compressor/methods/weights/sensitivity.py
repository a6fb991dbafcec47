"""How much each layer's module loses: sensitivity-aware sparsity, Eq. 7 of SparseSSM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ssmc.compressor.options.sparsity import ALPHA, check_ramp
from ssmc.runtime.errors import CalibrationError

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


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the smallest; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
