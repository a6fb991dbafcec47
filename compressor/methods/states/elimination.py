"""What a set of kept states costs, and the repair that makes it cost less, both from one matrix.

Removing state n from a Mamba-1 layer loses the term C_t[n] h_t[:, n]. C is linear in x_proj's input, so the kept
states' C rows can absorb what was lost: C_t becomes M C_t, which is M folded into x_proj, at no cost at run time.
With r = M - I on the kept rows and r = -I on the removed ones (their read-out is gone), the squared error of the gated
output over the calibration tokens is the quadratic form r' G r, where G is `statistics.NormalMatrix`. So the exact
error of any set of states, repaired or not, follows from G without touching the data again.

Fixing the rows of the removed set R at -I and minimising over the others costs t' [(G^-1)_RR]^-1 t with t = vec(-I_R):
the block form of Optimal Brain Surgeon. Backward elimination updates G^-1 by one block a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssmc.compressor.methods.ridge import ridged, solve

RIDGE = 1e-6  # times the mean diagonal of G; pulls M towards the identity where the data say nothing
SWAP_FLOPS = 2e10  # for a look at all swaps of a kept state for a removed one; some seconds
SCALED_RIDGE = 1e-4  # the same for one scale a state, where Q is a difference of sums in float32


@dataclass(frozen=True)
class Repair:
    """A mixing matrix for the kept states and what it achieves."""

    kept: tuple[int, ...]
    mixing: torch.Tensor | None  # (K, N) float64: rows of the kept states; None: not repaired
    error: float  # squared error of the gated output relative to its energy, with `mixing` if there is one
    error_unrepaired: float  # the same with the kept C rows left as they are


def evaluate(G: torch.Tensor, kept: Sequence[int], repair: bool) -> Repair:
    """Errors of a kept set and, if asked for, its least-squares repair.

    Args:
        G: (N N, N N) float64 from `NormalMatrix.dense`.
        kept: states that stay.
        repair: whether to solve for the mixing matrix.
    """
    n = _d_state(G)
    kept = sorted(kept)
    removed = [k for k in range(n) if k not in kept]
    change = torch.zeros(n, n, dtype=G.dtype)  # r = M - I, one row a state
    change[removed, removed] = -1.0
    energy = _quadratic(G, torch.eye(n, dtype=G.dtype))
    unrepaired = _quadratic(G, change)
    mixing = None
    if repair:
        free = _rows(kept, n)
        pull = G[free] @ change.flatten()
        change[kept] = -solve(ridged(G, RIDGE)[free][:, free], pull[:, None]).view(len(kept), n)
        mixing = change[kept] + torch.eye(n, dtype=G.dtype)[kept]
    relative = [_relative(error, energy) for error in (_quadratic(G, change), unrepaired)]
    return Repair(tuple(kept), mixing, *relative)


def eliminate(G: torch.Tensor, keep: int, repair: bool) -> list[int]:
    """Choose states by greedy backward elimination: take away the one whose loss hurts least, until `keep` are left.

    Args:
        G: (N N, N N) float64 from `NormalMatrix.dense`.
        keep: how many states stay.
        repair: judge a set by its error after repair, else by the error as it is.

    Returns:
        The kept states, ascending.
    """
    return _eliminate_repaired(G, keep) if repair else _eliminate_unrepaired(G, keep)


def exchange(G: torch.Tensor, kept: Sequence[int]) -> list[int]:
    """Swap kept states for removed ones as long as the repaired error falls, the best swap first.

    Backward elimination takes one state at a time and never looks back; most often no swap helps it, now and then one
    takes away a third of the error.

    Args:
        G: (N N, N N) float64 from `NormalMatrix.dense`.
        kept: states to start with.

    Returns:
        The kept states, ascending; those of the start where looking at all swaps would take more than SWAP_FLOPS.
    """
    n, best = _d_state(G), sorted(kept)
    if len(best) * (n - len(best)) * (len(best) * n) ** 3 / 3 > SWAP_FLOPS:
        return best
    solid, diagonal = ridged(G, RIDGE), torch.arange(n) * (n + 1)  # the entries (k, k) of vec(M)

    def error(states: Sequence[int]) -> float:
        free, gone = _rows(states, n), diagonal[[k for k in range(n) if k not in states]]
        pull = G[free][:, gone].sum(1)
        return float(G[gone][:, gone].sum() - pull @ solve(solid[free][:, free], pull[:, None])[:, 0])

    least = error(best)
    while True:
        others = [k for k in range(n) if k not in best]
        swaps = [sorted({*best, new} - {old}) for old in best for new in others]
        errors = [error(states) for states in swaps]
        if not errors or min(errors) >= least * (1 - 1e-6):
            return best
        least, best = min(errors), swaps[errors.index(min(errors))]


def _eliminate_repaired(G: torch.Tensor, keep: int) -> list[int]:
    """Losing state j costs e' (H_jj)^-1 e: H the inverse on what is left, e the change its row needs."""
    n = _d_state(G)
    H = torch.linalg.inv(ridged(G, RIDGE)).view(n, n, n, n)  # [state, reader, state, reader]
    M = torch.eye(n, dtype=G.dtype)  # the repaired read-out so far, one row a state
    left = list(range(n))
    while len(left) > keep:
        index = torch.tensor(left)
        blocks = H[index, :, index]  # (len(left), N, N): H_jj of every candidate
        needed = -M[index]  # row j has to become zero
        pushes = torch.linalg.solve(blocks, needed)  # (len(left), N)
        position = int((needed * pushes).sum(1).argmin())
        j = left.pop(position)
        M = M + torch.einsum("knp,p->kn", H[:, :, j], pushes[position])
        H = H - torch.einsum("knp,pmq->knmq", H[:, :, j], torch.linalg.solve(H[j, :, j], H[j].flatten(1)).view(n, n, n))
    return left


def _eliminate_unrepaired(G: torch.Tensor, keep: int) -> list[int]:
    """The same by the error as it is, for which only the entries (k, k) of vec(M) matter."""
    n = _d_state(G)
    diagonal = torch.arange(n) * (n + 1)  # the entries (k, k) of vec(I)
    return eliminate_from(G[diagonal][:, diagonal], keep)


def eliminate_from(Q: torch.Tensor, keep: int) -> list[int]:
    """Greedy backward elimination where losing the set R costs the sum of Q over R x R.

    Losing j after R costs Q_jj + 2 sum_{r in R} Q_jr more.

    Args:
        Q: (N, N) float64, symmetric.
        keep: how many states stay.

    Returns:
        The kept states, ascending.
    """
    left = list(range(len(Q)))
    removed: list[int] = []
    while len(left) > keep:
        cost = Q.diagonal() + 2 * Q[:, removed].sum(1)
        j = min(left, key=lambda state: (float(cost[state]), state))
        left.remove(j)
        removed.append(j)
    return left


def eliminate_scaled(Q: torch.Tensor, keep: int) -> list[int]:
    """Greedy backward elimination where the states that stay may be scaled to make up for those that go.

    With each state's read-out scaled by a[n] the error is r' Q r, r = a - 1 on the kept states and -1 on the removed
    ones: one number a state in place of the N of a mixing matrix, and the same elimination with N x N matrices.

    Args:
        Q: (N, N) float64, symmetric: `contributions.Contributions.errors`.
        keep: how many states stay.

    Returns:
        The kept states, ascending.
    """
    H, a, left = torch.linalg.inv(ridged(Q, SCALED_RIDGE)), torch.ones(len(Q), dtype=Q.dtype), list(range(len(Q)))
    while len(left) > keep:
        costs = a[left].square() / H.diagonal()[left]
        j = left.pop(int(costs.argmin()))
        column = H[:, j] / H[j, j]
        a = a - column * a[j]
        H = H - torch.outer(column, H[j])
    return left


def _quadratic(G: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return change.flatten() @ G @ change.flatten()


def _relative(error: torch.Tensor, energy: torch.Tensor) -> float:
    return float(error.clamp(min=0) / energy) if energy > 0 else 0.0


def _rows(states: Sequence[int], n: int) -> torch.Tensor:
    """Indices of the rows (k, 0..N-1) of vec(M) for the given states k."""
    return (torch.as_tensor(states)[:, None] * n + torch.arange(n)).flatten()


def _d_state(G: torch.Tensor) -> int:
    return round(len(G) ** 0.5)
