"""Masks from importance: tensor in, boolean tensor out, True where the entry is KEPT.

Every mask is a real top-K: exactly as many entries stay as were asked for. Equal importances are decided by position,
the earlier entry stays, so a mask is the same on every machine. (A threshold `importance <= t` is not a top-K: where
many entries tie, for example at 0, it takes all of them.)
"""

from __future__ import annotations

import torch

from ssmc.compressor.options.sparsity import NM, check_groups
from ssmc.runtime.errors import CalibrationError, UsageError


def pruned_count(entries: int, sparsity: float) -> int:
    """How many of `entries` go: round(sparsity * entries).

    Raises:
        UsageError: the sparsity is not inside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity} does not work: it is the part that is removed, at least 0 and below 1.")
    return round(sparsity * entries)


def unstructured_mask(importance: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The round(sparsity * numel) least important entries of the whole tensor go.

    Args:
        importance: any shape; the lowest goes.
        sparsity: part that is removed, in [0, 1).

    Returns:
        Boolean, the shape of `importance`, True where kept.
    """
    return lowest_mask(importance, pruned_count(importance.numel(), sparsity))


def lowest_mask(importance: torch.Tensor, count: int) -> torch.Tensor:
    """As `unstructured_mask`, with the number of entries that go given."""
    return _keep_highest(importance.flatten(), importance.numel() - count).view(importance.shape)


def per_row_mask(importance: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The round(sparsity * in) least important entries of every row go: Wanda compares within an output.

    The number is rounded row by row, so a row of 4 cannot lose 30 %: it loses 1 of 4.

    Args:
        importance: (out, in).
        sparsity: part that is removed, in [0, 1).
    """
    columns = importance.shape[-1]
    return _keep_highest(importance, columns - pruned_count(columns, sparsity))


def nm_mask(importance: torch.Tensor, n: int, m: int, axis: int = -1) -> torch.Tensor:
    """The n most important of every m consecutive entries along `axis` stay; see `NM` for what N means.

    An axis that m does not divide is refused: kernels for N:M take whole groups only.

    Args:
        importance: any shape.
        n: entries kept of each group.
        m: entries in a group.
        axis: along which groups lie; the inputs of a weight (out, in) for hardware.

    Raises:
        UsageError: not 0 < n < m, or m does not divide the axis.
    """
    check_groups(importance.shape[axis], NM(n, m))
    last = importance.movedim(axis, -1)
    groups = last.reshape(-1, m)
    return _keep_highest(groups, n).view(last.shape).movedim(-1, axis)


def _keep_highest(importance: torch.Tensor, keep: int) -> torch.Tensor:
    """True at the `keep` highest entries of each row (the last axis), ties to the earlier entry."""
    if importance.isnan().any():
        raise CalibrationError(
            "An importance is not a number (NaN), so nothing can be ranked. "
            "The model or its activations overflow: compute in float32 and check the checkpoint."
        )
    prune = importance.shape[-1] - keep
    if prune == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    # the k-th value and the ties at it: eight times as fast as a stable sort of a whole weight matrix
    threshold = importance.kthvalue(prune, dim=-1, keepdim=True).values
    above = importance > threshold
    ties = importance == threshold
    room = keep - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))
