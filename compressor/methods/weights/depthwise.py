"""Pruning a depthwise conv1d: D rows of K taps, each with its own K x K Hessian.

K is 4 in every Mamba, so nothing has to be greedy: all 2^K sets of taps of every channel are fitted exactly, and the
best are picked. Treating conv1d as one dense layer, as SparseSSM's published code does, mixes up inputs that no channel
shares and makes the weights worse than no update at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from ssmc.compressor.calibration.placement import computing
from ssmc.compressor.methods.weights.masks import lowest_mask, pruned_count
from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.methods.weights.sparsegpt import SparseGPTResult
from ssmc.compressor.options.sparsity import NM, Sparsity, check_groups
from ssmc.runtime.errors import UsageError

RIDGE = 1e-6  # of a channel's mean diagonal; pulls its taps to where they were when the data say nothing
MOST_TAPS = 8  # 2^K fits


def prune_depthwise(weight: torch.Tensor, hessian: torch.Tensor, sparsity: Sparsity) -> SparseGPTResult:
    """Prune conv1d and refit the taps that stay by least squares, exactly, channel by channel.

    Unstructured: exactly round(sparsity * D K) taps go, shared out over all channels so that the total squared error of
    the output is lowest: the best set for each number of taps is known for every channel, and their lower convex hulls
    are descended together. Optimal but for at most one channel, the one the exact total cuts in two.
    N:M: the best allowed set of every channel, which is optimal.

    Args:
        weight: (D, K); not modified.
        hessian: (D, K, K), `DepthwiseSecondMoment.total` or any positive multiple of it.
        sparsity: sparsity in [0, 1), or an N:M pattern along the taps.

    Raises:
        UsageError: sparsity outside [0, 1), taps that are not whole groups, or more taps than can be tried.
        CalibrationError: H is not finite.
    """
    before = weight.detach().double()
    channels, taps = before.shape
    if taps > MOST_TAPS:
        raise UsageError(f"conv1d has {taps} taps; all sets of at most {MOST_TAPS} can be tried. Leave it out.")
    H = check_finite(hessian).to(before.device, torch.float64)
    if isinstance(sparsity, NM):
        check_groups(taps, sparsity)
        errors, fits, kept = _best_sets(before, H, sparsity)
        removed = torch.full((channels,), taps // sparsity.m * (sparsity.m - sparsity.n), device=before.device)
    else:
        total = pruned_count(weight.numel(), sparsity)
        errors, fits, kept = _best_sets(before, H, None)
        removed = _share_out(errors, total)
    chosen = torch.arange(channels, device=before.device), removed
    energy = float(torch.einsum("dk,dkj,dj->", before, H, before))
    error = max(0.0, float(errors[chosen].sum())) / energy if energy > 0 else 0.0
    return SparseGPTResult(fits[chosen].to(computing(weight).dtype), kept[chosen], error, RIDGE)


def _best_sets(W: torch.Tensor, H: torch.Tensor, pattern: NM | None) -> tuple[torch.Tensor, ...]:
    """For each channel and number of removed taps: the lowest error (D, K + 1), its taps and mask (D, K + 1, K)."""
    channels, taps = W.shape
    errors = W.new_full((channels, taps + 1), torch.inf)
    fits = W.new_zeros(channels, taps + 1, taps)
    masks = torch.zeros_like(fits, dtype=torch.bool)
    for keep in _sets(taps, pattern):
        mask = torch.tensor(keep, device=W.device)
        fit = _fit(W, H, mask)
        change = fit - W
        error = torch.einsum("dk,dkj,dj->d", change, H, change)
        removed = taps - sum(keep)
        better = error < errors[:, removed]
        errors[better, removed] = error[better]
        fits[better, removed] = fit[better]
        masks[better, removed] = mask
    return errors, fits, masks


def _sets(taps: int, pattern: NM | None) -> Iterator[tuple[bool, ...]]:
    """All sets of kept taps, or those that an N:M pattern allows."""
    for keep in product((True, False), repeat=taps):
        if pattern is None or all(sum(keep[g : g + pattern.m]) == pattern.n for g in range(0, taps, pattern.m)):
            yield keep


def _fit(W: torch.Tensor, H: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Taps (D, K) that are zero outside `keep` and reproduce the output best."""
    fit = W * keep
    if keep.all() or not keep.any():
        return fit
    free = H[:, keep][:, :, keep]  # (D, F, F)
    mean = H.diagonal(dim1=1, dim2=2).mean(1)  # (D,)
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))  # a silent channel keeps its taps as they are
    pull = H[:, keep][:, :, ~keep] @ W[:, ~keep, None]  # (D, F, 1): what the removed taps did
    free = free + ridge[:, None, None] * torch.eye(free.shape[1], dtype=H.dtype, device=H.device)
    fit[:, keep] += torch.linalg.solve(free, pull)[..., 0]
    return fit


def _share_out(errors: torch.Tensor, total: int) -> torch.Tensor:
    """How many taps each channel loses, (D,), `total` in all, from the errors (D, K + 1) of losing 0..K."""
    return (~lowest_mask(hull_slopes(errors), total)).sum(1)


def hull_slopes(errors: torch.Tensor) -> torch.Tensor:
    """Slopes (D, K) of the greatest convex minorant of each row of `errors` (D, K + 1) at 0..K.

    The slope over step c is max over a <= c of min over b > c of the chord from a to b (the minimax formula).
    """
    taps = errors.shape[1] - 1
    slopes = []
    for c in range(taps):
        lowest = [
            torch.stack([(errors[:, b] - errors[:, a]) / (b - a) for b in range(c + 1, taps + 1)]).amin(0)
            for a in range(c + 1)
        ]
        slopes.append(torch.stack(lowest).amax(0))
    return torch.stack(slopes, dim=1)
