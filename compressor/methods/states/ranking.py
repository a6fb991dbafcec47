"""From importance to what stays: real top-Ks, ties decided by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmc.compressor.methods.method import layer_seed
from ssmc.compressor.methods.weights.masks import nm_mask, unstructured_mask
from ssmc.compressor.options.sparsity import NM, Sparsity


def highest(importance: torch.Tensor, keep: int) -> list[int]:
    """The `keep` most important of (N,), ascending."""
    # stable, so that equal importances are decided by position and not by the sorting routine
    return sorted(importance.cpu().argsort(descending=True, stable=True)[:keep].tolist())


def lowest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest of each row."""
    named = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    return named.scatter_(1, importance.topk(count, dim=1, largest=False).indices, True)


def entry_mask(importance: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """True where an entry stays."""
    if isinstance(sparsity, NM):
        return nm_mask(importance, sparsity.n, sparsity.m)
    return unstructured_mask(importance, sparsity)


def by_head(importance: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., D, N) summed over the channels and states of each head, (..., H)."""
    return importance.unflatten(-2, (heads, -1)).sum((-2, -1))


def random_importance(shape: Sequence[int], layer: int, seed: int) -> torch.Tensor:
    """Numbers that say nothing, the same for the same seed and layer."""
    generator = torch.Generator().manual_seed(layer_seed(seed, layer))
    return torch.rand(*shape, generator=generator, dtype=torch.float64)
