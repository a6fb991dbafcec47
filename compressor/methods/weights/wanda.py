"""Masks that need no Hessian inverse: magnitude, and Wanda (Sun et al. 2024). Weights are not updated."""

from __future__ import annotations

import torch

from ssmc.compressor.methods.weights.masks import nm_mask, per_row_mask, unstructured_mask
from ssmc.compressor.options.sparsity import NM, Sparsity


def magnitude(weight: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Keep the largest |W|, compared over the whole tensor, or within each group of an N:M pattern.

    Args:
        weight: (out, in), or (D, K) of a depthwise conv1d.
        sparsity: sparsity in [0, 1), or an N:M pattern along the last axis.

    Returns:
        Boolean mask, True where kept.
    """
    importance = weight.abs()
    return _nm(importance, sparsity) if isinstance(sparsity, NM) else unstructured_mask(importance, sparsity)


def wanda(weight: torch.Tensor, squares: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Keep the largest |W_ij| ||x_j||, compared within each output i (row), or within each group of an N:M pattern.

    Args:
        weight: (out, in), or (D, K) of a depthwise conv1d.
        squares: sum of x_j^2, (in,): the diagonal of H; for conv1d (D, K), the diagonal of each channel's matrix.
        sparsity: sparsity in [0, 1), or an N:M pattern along the last axis.

    Returns:
        Boolean mask, True where kept.
    """
    importance = weight.abs().double() * squares.double().sqrt()
    return _nm(importance, sparsity) if isinstance(sparsity, NM) else per_row_mask(importance, sparsity)


def _nm(importance: torch.Tensor, pattern: NM) -> torch.Tensor:
    return nm_mask(importance, pattern.n, pattern.m)
