"""Channels of d_inner: which stay, and what the weights that stay become to make up for the others.

Dropping channel j takes it out of everything in a mixer. Two linear maps read channels, and both can be refitted in
closed form on second moments of what they read:

- out_proj reads the gated scan output y (D,). Its columns are chosen by structured Optimal Brain Surgeon: with
  H = (E[y y'] + ridge)^-1 the loss of column j after the other columns have made up for it is ||W[:, j]||^2 / H_jj.
- x_proj reads u (D,): W' = W G[:, kept] (G[kept, kept] + ridge)^-1 with G = E[u u'].

Then out_proj is fitted once more, to the dense model's residual stream on the pruned layer's own y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmc.compressor.methods.weights.second_moments import check_finite
from ssmc.compressor.options.patterns import Score

RIDGE = 1e-4  # times the mean diagonal of a second moment
BLOCK = 64  # channels removed between two updates of the full matrices: speed only


def choose_channels(
    score: Score, weight: torch.Tensor, moment: torch.Tensor | None, keep: int, generator: torch.Generator
) -> list[int]:
    """The channels that stay, ascending.

    Args:
        score: obs; activation, E[y_j^2] ||W[:, j]||^2; magnitude, ||W[:, j]||^2; or random.
        weight: (d_model, D) of out_proj.
        moment: (D, D) sum of y y' over the calibration tokens; None for the scores that look at no text.
        keep: how many stay.
        generator: for `random`.
    """
    if score is Score.obs:
        return eliminate_channels(weight, moment, keep)
    norms = weight.double().square().sum(0).cpu()
    importance = {
        Score.magnitude: lambda: norms,
        Score.activation: lambda: norms * moment.diagonal().cpu(),
        Score.random: lambda: torch.rand(len(norms), generator=generator, dtype=torch.float64),
    }[score]()
    # stable, so that equal importances are decided by position and not by the sorting routine
    return sorted(importance.argsort(descending=True, stable=True)[:keep].tolist())


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
    H = torch.cholesky_inverse(torch.linalg.cholesky(ridged(moment)))
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


def refit(weight: torch.Tensor, moment: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
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


def fit(cross: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The linear map of x that comes closest to a target: W = (sum t x') (sum x x' + ridge)^-1.

    Args:
        cross: (out, in) sum of t x' over tokens.
        moment: (in, in) sum of x x' over tokens.

    Returns:
        (out, in) float64.
    """
    return torch.cholesky_solve(cross.t().double(), torch.linalg.cholesky(ridged(moment))).t()


def ridged(moment: torch.Tensor) -> torch.Tensor:
    """A second moment with a little on its diagonal, float64, so that inputs that say nothing new do no harm."""
    moment = check_finite(moment).double()
    mean = moment.diagonal().mean()
    # inputs that are zero everywhere: any positive ridge leaves their weights at zero
    ridge = RIDGE * mean if mean > 0 else torch.ones((), dtype=moment.dtype, device=moment.device)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
