"""Streaming sums over the hidden states of one layer: all that scores and repair need, in memory independent of L.

A statistic sees the states of all samples for a stretch of time steps (a chunk), a few samples at a time, then is told
that the stretch is over. Statistics that need the sum over samples *at each time step* before they go on (the vote, the
time weights) hold it for one chunk only. Sums are plain sums: every sample and every token weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ssmc.compressor.methods.weights.second_moments import StateMoment
from ssmc.compressor.options.config import Weighting
from ssmc.runtime.collectives import summed
from ssmc.runtime.errors import UsageError
from ssmc.runtime.ranks import ranks
from ssmc.runtime.scan import Moments, ScanInputs, SsdMoments, quartic_moment, sum_of_squares

Sum = Any
"""A tensor that sums something up; 0.0 before anything was added."""


@dataclass(frozen=True)
class Chunk:
    """The states of a few samples over a stretch of time."""

    start: int  # time step of the first token
    inputs: ScanInputs  # of this stretch: u, dt, z (B, T, D), B and C (B, T, N)
    states: torch.Tensor  # (B, T + 1, N, D) float32; entry t is the state before the stretch's token t
    gains: torch.Tensor | None = None  # (B, T, D) by which a read-out is multiplied on its way to out_proj
    weights: torch.Tensor | None = None  # (B, T) how much an error at each token counts; None: all the same

    @property
    def before(self) -> torch.Tensor:
        """h_{t-1}, (B, T, N, D)."""
        return self.states[:, :-1]

    @property
    def after(self) -> torch.Tensor:
        """h_t, (B, T, N, D)."""
        return self.states[:, 1:]

    def gain(self) -> torch.Tensor:
        """By what an error of a read-out is multiplied before it is squared, (B, T, D): by what the read-out is on its
        way to out_proj, the gate silu(z) if nothing else, and by the root of the token's weight."""
        gain = self.gains
        if gain is None:
            gain = torch.ones_like(self.inputs.u) if self.inputs.z is None else F.silu(self.inputs.z.float())
        return gain if self.weights is None else gain * self.weights.sqrt()[..., None]


class Statistic:
    """A streaming sum; subclasses say of what."""

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        raise NotImplementedError

    def add_moments(self, moments: Moments | SsdMoments) -> None:
        """Take in sums over the states of a few samples, where `takes_moments`."""
        raise NotImplementedError

    @property
    def takes_moments(self) -> bool:
        """Whether sums over all tokens are all this needs."""
        return type(self).add_moments is not Statistic.add_moments

    @property
    def takes_weights(self) -> bool:
        """Whether tokens count by their weights here: a sum of squared errors, not what a published score sums."""
        return False

    def end_of_stretch(self) -> None:
        """Every sample of this stretch of time has been added."""

    def pool(self) -> None:
        """All samples of this process have been added: add what the others have, see `runtime.collectives`.

        Raises:
            UsageError: this is no sum that several processes can add up.
        """
        if ranks() > 1:
            raise UsageError(
                f"{type(self).__name__} cannot be collected by several processes. Use one, or another --score."
            )


@dataclass
class SquaredStates(Statistic):
    """sum over samples and time of h_{t-1}^2, as Theorem 1 of SparseSSM needs it; `value` is (N, D)."""

    value: Sum = 0.0

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        self.value = self.value + sum_of_squares(chunk.before).double()

    def add_moments(self, moments: Moments | SsdMoments) -> None:
        """Take in sums over the states of a few samples."""
        self.value = self.value + moments.before

    def pool(self) -> None:
        """Add what the other processes have."""
        self.value = summed(self.value)


@dataclass
class SquaredReadout(Statistic):
    """The factors and the product of the read-out C_t[n] h_t[d, n], for `ghost` and `energy`."""

    states: Sum = 0.0  # (N, D): sum of h_t^2
    readers: Sum = 0.0  # (N,): sum of C_t^2
    products: Sum = 0.0  # (N, D): sum of (C_t h_t)^2

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        C = chunk.inputs.C.float()  # (B, T, N)
        self.states = self.states + sum_of_squares(chunk.after).double()
        self.readers = self.readers + C.square().sum((0, 1)).double()
        self.products = self.products + sum_of_squares(chunk.after, C).double()

    def add_moments(self, moments: Moments | SsdMoments) -> None:
        """Take in sums over the states of a few samples."""
        self.states = self.states + moments.after
        self.readers = self.readers + moments.readers
        self.products = self.products + moments.readouts

    def pool(self) -> None:
        """Add what the other processes have."""
        self.states, self.readers, self.products = summed(self.states), summed(self.readers), summed(self.products)


@dataclass
class TimeWeighted(Statistic):
    """sum_t w_t (sum_b dA_t)^2 (sum_b h_{t-1}^2): SparseSSM v2. `value` is (N, D).

    `weights` (L,) start at the first step that has a state behind it, so none is spent on the first token, where the
    published code puts an eighth of its weight on h = 0. See `time_weights`.
    """

    weights: torch.Tensor
    value: Sum = 0.0
    _start: int = 0
    _squares: Sum = 0.0  # (T, N, D): sum over samples of h_{t-1}^2
    _decays: Sum = 0.0  # (T, N, D): sum over samples of dA_t = exp(dt_t A)

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        self._start = chunk.start
        self._squares = self._squares + chunk.before.square().sum(0)
        exponent = chunk.inputs.dt.float()[:, :, None, :] * chunk.inputs.A.t()  # (B, T, N, D)
        self._decays = self._decays + exponent.exp_().sum(0)

    def end_of_stretch(self) -> None:
        """Every sample of this stretch of time has been added."""
        self._squares, self._decays = summed(self._squares), summed(self._decays)
        steps = torch.arange(len(self._squares)) + self._start - 1
        weights = self.weights[steps.clamp(min=0)] * (steps >= 0)  # step 0 has no state behind it
        importance = (self._decays.square() * self._squares).double()
        self.value = self.value + torch.einsum("t,tnd->nd", weights.double().to(importance.device), importance)
        self._squares = self._decays = 0.0

    def pool(self) -> None:
        """Every stretch was added up by itself."""


def time_weights(kind: Weighting, length: int) -> torch.Tensor:
    """Weights of `length` time steps, (length,) float64, summing to 1 : the published code's choices."""
    t = torch.arange(length, dtype=torch.float64)
    weights = {
        Weighting.power: 1 / (t + 1),
        Weighting.linear: length - t,
        Weighting.discount: 0.9**t,
        Weighting.window: (t < math.ceil(length / 4)).double(),
        Weighting.uniform: torch.ones_like(t),
    }[kind]
    return weights / weights.sum()


@dataclass
class Vote(Statistic):
    """How often each candidate for removal is named: SparseSSM v1, Algorithm 1.

    At every time step the importance of an entry is A_log^2 * sum_b h_{t-1}^2, that of a state the sum over its
    entries, and the step names the least important ones. The first token is left out: its h_{t-1} is zero everywhere
    and says nothing.
    """

    A_log: torch.Tensor  # (D, N)
    name: Callable[[torch.Tensor], torch.Tensor]  # importance (T, ...) -> which are named at each step, bool (T, ...)
    states: bool  # judge whole states, (T, N); else entries, (T, D, N)
    value: Sum = 0.0  # (N,) or (D, N): how often each was named
    _start: int = 0
    _importance: Sum = 0.0  # of this stretch so far

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        self._start = chunk.start
        weights = self.A_log.float().square().t()  # (N, D)
        squares = chunk.before.square()
        if self.states:
            importance = torch.einsum("btnd,nd->tn", squares, weights).double()
        else:
            importance = (squares.sum(0) * weights).transpose(1, 2)  # (T, D, N)
        self._importance = self._importance + importance

    def end_of_stretch(self) -> None:
        """Every sample of this stretch of time has been added."""
        self._importance = summed(self._importance)
        steps = self._importance[1:] if self._start == 0 else self._importance
        self.value = self.value + self.name(steps).sum(0)
        self._importance = 0.0

    def pool(self) -> None:
        """Every stretch was added up by itself."""


@dataclass
class States(Statistic):
    """sum of h_{t-1} h_{t-1}' over samples, time and channels, for the baseline SparseGPT on A_log."""

    moment: StateMoment

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        self.moment.add(chunk.before)

    def pool(self) -> None:
        """Add what the other processes have."""
        self.moment.pool()


@dataclass
class NormalMatrix(Statistic):
    """The normal matrix of the repair, N^4 numbers.

    G[k, n, m, p] = sum_t w_t (sum_d g_{t,d}^2 h_t[d, k] h_t[d, m]) C_t[n] C_t[p], with g = silu(z) the gate that
    follows and w_t the token's weight: a sum over tokens of outer products of two small (N, N) matrices, so one matrix
    product per chunk.
    """

    value: Sum = 0.0  # (N N, N N) float64, row index k N + m, column index n N + p

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        self.value = self.value + quartic_moment(chunk.after, chunk.inputs, chunk.weights)

    @property
    def takes_weights(self) -> bool:
        """It sums squared errors."""
        return True

    def add_moments(self, moments: Any) -> None:
        """Take in sums over the states of a few samples."""
        self.value = self.value + moments.quartic

    def pool(self) -> None:
        """Add what the other processes have."""
        self.value = summed(self.value)

    def dense(self) -> torch.Tensor:
        """G as the quadratic form of vec(M): (N N, N N) float64 on the CPU, row index k N + n, column index m N + p."""
        n = round(len(self.value) ** 0.5)
        return self.value.cpu().view(n, n, n, n).permute(0, 2, 1, 3).reshape(n * n, n * n)
