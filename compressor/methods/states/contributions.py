"""What each state contributes to a Mamba-2's output: N^2 numbers from which the error of losing any set follows.

B and C of a Mamba-2 pass conv1d and silu, so no mixture of C rows folds into the weights and only the choice of states
is free. Losing the set R takes sum_{n in R} C_t[n] h_t[:, n] from what a group reads out. With x_t[d, n] that
contribution times the gain of the channel (what follows it: gate, gated norm), the squared error is the sum of

    Q[n, m] = sum_t sum_d x_t[d, n] x_t[d, m]

over R x R. One thing folds: part of what is lost looks like the skip D u, with one number a head. The best change of
head k is sum_{n in R} c[k, n] / s[k], with c[k, n] = sum x_t[d, n] u'_t[d], s[k] = sum u'_t[d]^2, u' = gain u and the
sums over tokens and the head's channels; the error becomes the sum of Q - sum_k c_k c_k' / s_k over R x R, so the set
can be chosen for what is left after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssmc.compressor.methods.states.statistics import Chunk, Statistic, Sum
from ssmc.runtime.collectives import summed


@dataclass
class Contributions(Statistic):
    """Q and what the skip needs, as streaming sums, of one group of heads."""

    heads: int  # of this group
    gram: Sum = 0.0  # (N, N) float64: Q
    cross: Sum = 0.0  # (H, N) float64: c
    skip: Sum = 0.0  # (H,) float64: s

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        gain = chunk.gain()  # (B, T, D)
        read = chunk.after * chunk.inputs.C.float()[..., None] * gain[:, :, None, :]  # (B, T, N, D)
        skip = chunk.inputs.u.float() * gain  # (B, T, D)
        rows = read.transpose(2, 3).flatten(0, 2)  # (B T D, N)
        self.gram = self.gram + (rows.t() @ rows).double()
        cross = torch.einsum("btnd,btd->dn", read, skip).double()
        self.cross = self.cross + cross.unflatten(0, (self.heads, -1)).sum(1)
        self.skip = self.skip + skip.square().sum((0, 1)).double().unflatten(0, (self.heads, -1)).sum(1)

    def add_moments(self, moments: Any) -> None:
        """Take in sums over the states of a few samples."""
        self.gram = self.gram + moments.gram
        self.cross = self.cross + moments.cross
        self.skip = self.skip + moments.skip

    @property
    def takes_weights(self) -> bool:
        """It sums squared errors."""
        return True

    def pool(self) -> None:
        """Add what the other processes have."""
        self.gram, self.cross, self.skip = summed(self.gram), summed(self.cross), summed(self.skip)

    def errors(self, repair: bool) -> torch.Tensor:
        """(N, N) matrix whose sum over R x R is the squared error of losing R, with the skip refitted or not."""
        if not repair:
            return self.gram.cpu()
        safe = torch.where(self.skip > 0, self.skip, 1.0)
        return (self.gram - self.cross.t() @ (self.cross / safe[:, None])).cpu()


@dataclass(frozen=True)
class Loss:
    """Squared errors of what is read out of the states, and the energy they are part of."""

    error: float = 0.0  # with the skip refitted, if that was asked for
    error_unrepaired: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        """Of two groups together."""
        return Loss(
            self.error + other.error,
            self.error_unrepaired + other.error_unrepaired,
            self.energy + other.energy,
        )

    def relative(self) -> tuple[float, float]:
        """Both errors, relative to the energy."""
        return self._relative(self.error), self._relative(self.error_unrepaired)

    def _relative(self, error: float) -> float:
        return max(0.0, error) / self.energy if self.energy > 0 else 0.0


def loss_of(contributions: Contributions, removed: Sequence[int], repair: bool) -> Loss:
    """What losing some states of a group costs; see `Contributions.errors`."""
    index = torch.as_tensor(list(removed), dtype=torch.long)
    error, unrepaired = (float(contributions.errors(way)[index][:, index].sum()) for way in (repair, False))
    return Loss(error, unrepaired, float(contributions.gram.sum()))
