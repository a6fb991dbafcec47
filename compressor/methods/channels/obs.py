"""Channels of d_inner: which stay, and what the weights that stay become to make up for the others.

Dropping channel j takes it out of everything in a mixer. Two linear maps read channels, and both can be refitted in
closed form on second moments of what they read:

- out_proj reads the gated scan output y (D,). Its columns are chosen by structured Optimal Brain Surgeon: with
  H = (E[y y'] + ridge)^-1 the loss of column j after the other columns have made up for it is ||W[:, j]||^2 / H_jj.
- x_proj reads u (D,): W' = W G[:, kept] (G[kept, kept] + ridge)^-1 with G = E[u u'].

Then out_proj is fitted once more, to the dense model's residual stream on the pruned layer's own y.
"""

from __future__ import annotations

import torch

from ssmc.compressor.methods.ridge import inverse, ridged

BLOCK = 64  # channels removed between two updates of the full matrices: speed only


def eliminate_channels(weight: torch.Tensor, moment: torch.Tensor, keep: int, block: int = BLOCK) -> list[int]:
    """Structured OBS: take away the column whose loss the other columns mend best, until `keep` are left.

    After each removal W and H are those of the smaller problem, exactly: with c = H[:, j], W -= W[:, j] c' / c_j and
    H -= c c' / c_j. The losses need W only through Q = W' W, so what is carried along are two (D, D) matrices whose
    updates of a block of removals are one matrix product.

    Args:
        weight: (out, D).
        moment: (D, D) sum of y y' over tokens.
        keep: how many columns stay.
        block: removals between two such products; no matter but of speed and rounding.

    Returns:
        The kept columns, ascending.
    """
    H = inverse(ridged(moment))
    W = weight.to(H)
    Q, left = W.t() @ W, torch.arange(len(H), device=H.device)
    while len(left) > keep:
        stay, H, Q = _remove_some(H, Q, min(block, len(left) - keep))
        left = left[stay]
    return left.tolist()


def _remove_some(H: torch.Tensor, Q: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Remove `count` columns: the indices that stay, and H and Q on them.

    The matrices are H - V V' and Q - P E' - E P' meanwhile; only the columns and diagonals asked for are computed.
    """
    V, P, E = (H.new_zeros(len(H), count) for _ in range(3))
    diagonal_H, diagonal_Q = H.diagonal().clone(), Q.diagonal().clone()
    stay = torch.ones(len(H), dtype=torch.bool, device=H.device)
    for i in range(count):
        j = int((diagonal_Q / diagonal_H).masked_fill(~stay, torch.inf).argmin())
        stay[j] = False
        c = H[:, j] - V @ V[j]
        q = Q[:, j] - P @ E[j] - E @ P[j]
        V[:, i] = c / c[j].sqrt()
        E[:, i] = c / c[j]
        P[:, i] = q - q[j] / 2 * E[:, i]
        diagonal_H -= V[:, i].square()
        diagonal_Q -= 2 * P[:, i] * E[:, i]
    V, P, E = V[stay], P[stay], E[stay]
    change = P @ E.t()
    return stay.nonzero()[:, 0], H[stay][:, stay] - V @ V.t(), Q[stay][:, stay] - change - change.t()
