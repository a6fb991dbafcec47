"""Heads of a Mamba-2: which stay, by structured Optimal Brain Surgeon on out_proj, a head's columns as one block.

With H = (sum y y' + ridge)^-1 over what out_proj reads, losing the columns W_h of head h after the other columns have
made up for it costs tr(W_h (H_hh)^-1 W_h'): the block form of what `channels` does with single columns. That the gated
norm takes its mean over fewer channels afterwards is left to the fit of out_proj that follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmc.compressor.methods.ridge import inverse, ridged


def highest_of_each_group(importance: torch.Tensor, keep: int, groups: int) -> list[int]:
    """The most important heads, ascending, as many in each group.

    Args:
        importance: (H,).
        keep: how many stay, a multiple of `groups`.
        groups: of H / G neighbouring heads.
    """
    per_group, kept = len(importance) // groups, []
    for first in range(0, len(importance), per_group):
        order = importance[first : first + per_group].argsort(descending=True, stable=True)
        kept += sorted(first + int(head) for head in order[: keep // groups])
    return kept


def eliminate_heads(weight: torch.Tensor, moment: torch.Tensor, keep: int, heads: int, groups: int) -> list[int]:
    """Take away the head whose loss the other columns mend best, until `keep` are left, as many in each group.

    After each removal W and H are those of the smaller problem, exactly: W -= W_h K and H -= H_:h K with
    K = (H_hh)^-1 H_h:.

    Args:
        weight: (out, D).
        moment: (D, D) sum of y y' over tokens.
        keep: how many stay, a multiple of `groups`.
        heads: of D / H neighbouring channels.
        groups: of H / G neighbouring heads.

    Returns:
        The kept heads, ascending.
    """
    H = inverse(ridged(moment))
    W, P, per_group = weight.to(H), len(H) // heads, heads // groups
    left = list(range(heads))
    while len(left) > keep:
        counts = [sum(head // per_group == group for head in left) for group in range(groups)]
        able = [head for head in left if counts[head // per_group] > keep // groups]
        channels = torch.stack([_channels(head, P) for head in able])  # (able, P)
        blocks = H[channels[:, :, None], channels[:, None, :]]  # (able, P, P)
        columns = W[:, channels].permute(1, 2, 0)  # (able, P, out)
        costs = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        gone = able[int(costs.argmin())]
        index = _channels(gone, P)
        K = torch.linalg.solve(H[index][:, index], H[index])  # (P, D)
        W, H = W - W[:, index] @ K, H - H[:, index] @ K
        left.remove(gone)
    return left


def channels_of(heads: Sequence[int], head_dim: int) -> list[int]:
    """The channels of some heads, ascending."""
    return [head * head_dim + channel for head in sorted(heads) for channel in range(head_dim)]


def _channels(head: int, head_dim: int) -> torch.Tensor:
    return torch.arange(head * head_dim, (head + 1) * head_dim)
