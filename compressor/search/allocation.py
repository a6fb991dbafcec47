"""Which sizes meet a goal with the least loss: curves of loss over what is removed, added up, and a full enumeration.

Nothing here runs a model. What each part of a pattern costs is measured elsewhere at a few sparsities; between them a
power law is assumed, and the losses of several parts are taken to add up. That is good enough to make a shortlist.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ssmc.compressor.options.patterns import CHANNEL, COLUMN, HEAD, HEAD_DIM, LAYER, WIDTH
from ssmc.runtime.models.families import Dimensions

SMALLEST = 1e-6  # nats a token: what a loss of zero, or below it by chance, is taken for
EXPONENT = 2.0  # of the power law where only one point was measured
ROUNDS = 3  # of clocking what was chosen and choosing again


S = TypeVar("S")
"""Sizes, whatever they are of; they have an order."""


@dataclass(frozen=True, order=True)
class Sizes:
    """A model of the same family: how many layers, channels and states stay, and of how wide a stream."""

    n_layer: int
    d_inner: int
    d_state: int
    d_model: int = 0  # 0: that of the dense model

    @classmethod
    def of(cls, dense: Dimensions) -> Sizes:
        """The sizes of the dense model."""
        return cls(dense.n_layer, dense.d_inner, dense.d_state)

    def as_record(self) -> dict[str, int]:
        """For a manifest: d_model only where it changes."""
        return {name: size for name, size in asdict(self).items() if size}

    def blocks(self) -> list[tuple[int, int]]:
        """(d_inner, d_state) of every block, as a latency table takes them."""
        return [(self.d_inner, self.d_state)] * self.n_layer

    def removed(self, dense: Dimensions) -> dict[str, float]:
        """The share of each part of the pattern that is gone."""
        shares = {
            LAYER: 1 - self.n_layer / dense.n_layer,
            COLUMN: 1 - self.d_state / dense.d_state,
            part_of_width(dense, self.d_inner): 1 - self.d_inner / dense.d_inner,
            WIDTH: 1 - self.d_model / dense.d_model if self.d_model else 0.0,
        }
        return {part: share for part, share in shares.items() if share > 0}


def part_of_width(dense: Dimensions, d_inner: int) -> str:
    """The part of a pattern that leaves this d_inner: channels, or of a Mamba-2 heads, and channels of all heads where
    the heads that stay would not be whole, or not as many in every group."""
    if dense.heads is None:
        return CHANNEL
    return HEAD_DIM if d_inner % (dense.d_inner // dense.heads * dense.groups) else HEAD


@dataclass(frozen=True)
class Curve:
    """Excess loss, in nats a token, over the share that is removed: a power law between measured points.

    Attributes:
        shares: where it was measured, rising, inside (0, 1).
        losses: what was measured there, positive, never falling.
    """

    shares: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def through(cls, measured: Mapping[float, float]) -> Curve:
        """The curve through measured points; a loss below that of a smaller share is noise and is raised to it."""
        shares = sorted(measured)
        losses: list[float] = []
        for share in shares:
            losses.append(max(measured[share], SMALLEST, *losses[-1:]))
        return cls(tuple(shares), tuple(losses))

    def at(self, share: float) -> float:
        """The loss where `share` is removed; beyond the measured points the power law goes on."""
        if share <= 0:
            return 0.0
        if len(self.shares) == 1:
            return self.losses[0] * (share / self.shares[0]) ** EXPONENT
        last = len(self.shares) - 2
        i = min(max(sum(s <= share for s in self.shares) - 1, 0), last)
        (s0, s1), (e0, e1) = self.shares[i : i + 2], self.losses[i : i + 2]
        exponent = math.log(e1 / e0) / math.log(s1 / s0)
        if share < s0:
            exponent = max(exponent, 1.0)  # a flat start would say that even nothing costs something
        return e0 * (share / s0) ** exponent


@dataclass(frozen=True)
class LossModel:
    """The excess loss of a model of other sizes, as the sum of what its parts cost alone."""

    dense: Dimensions
    curves: Mapping[str, Curve]  # by part of the pattern

    def __call__(self, sizes: Sizes) -> float:
        """Nats a token."""
        return sum(self.curves[part].at(share) for part, share in sizes.removed(self.dense).items())


@dataclass(frozen=True)
class Limit:
    """What a candidate may cost at most: a share of the dense model's parameters, of its memory or of its time.

    Attributes:
        name: of what is limited.
        cost: of a candidate, 1 for the dense model.
        most: of the cost.
        in_words: such a share for people; None: a number and the name.
        in_short: the same without saying of what; None: a number.
    """

    name: str
    cost: Callable[[Any], float]
    most: float
    in_words: Callable[[float], str] | None = None
    in_short: Callable[[float], str] | None = None

    def told(self, share: float) -> str:
        """A share as it is printed: "0.5 of the parameters"."""
        return f"{share:.4g} of the {self.name}" if self.in_words is None else self.in_words(share)

    def least(self, share: float) -> str:
        """The same, shorter: "0.500"."""
        return f"{share:.3f}" if self.in_short is None else self.in_short(share)

    def allows(self, sizes: Any) -> bool:
        """Whether a candidate is within the limit."""
        return self.cost(sizes) <= self.most


def removable_layers(n_layer: int) -> range:
    """How many layers may stay: at least half of them, since the loss of more is beyond what any curve foretells."""
    return range(n_layer - n_layer // 2, n_layer + 1)


def enumerate_sizes(
    layers: Iterable[int], widths: Sequence[int], states: Sequence[int], d_models: Sequence[int] = (0,)
) -> list[Sizes]:
    """Every combination."""
    return [Sizes(*sizes) for sizes in itertools.product(layers, widths, states, d_models)]


def shortlist(
    candidates: Iterable[Sizes],
    limits: Sequence[Limit],
    loss: Callable[[Sizes], float],
    count: int,
    by_layers: bool = False,
) -> list[Sizes]:
    """The candidates within all limits that are expected to lose least, the best first.

    Of those that differ only in their states the best one is listed, so that the list shows really different ways; with
    `by_layers` one of those with as many layers: what the losses at once say between them holds least after steps.
    """
    best: dict[tuple[int, int, int], Sizes] = {}
    for sizes in sorted(candidates):
        if all(limit.allows(sizes) for limit in limits):
            key = (sizes.n_layer, 0 if by_layers else sizes.d_inner, sizes.d_model)
            if key not in best or loss(sizes) <= loss(best[key]):  # at equal loss more states
                best[key] = sizes
    return sorted(best.values(), key=lambda sizes: (loss(sizes), sizes))[:count]


def frontier(
    candidates: Iterable[S],
    cost: Callable[[S], float],
    loss: Callable[[S], float],
    able: Callable[[S], bool] = lambda _: True,
) -> list[S]:
    """Those able ones that nothing else beats in both cost and loss, the cheapest (and most lossy) first."""
    found: list[S] = []
    for sizes in sorted(candidates, key=lambda sizes: (loss(sizes), cost(sizes), sizes)):
        if (not found or cost(sizes) < cost(found[-1])) and able(sizes):
            found.append(sizes)
    return found[::-1]


def cheapest_within(candidates: Sequence[S], measure: Callable[[S], float], bound: float, start: int) -> S | None:
    """The first of `candidates` (the cheapest first) whose measured loss is within `bound`, by bisection.

    Args:
        candidates: their losses fall along the list, or nearly.
        measure: runs a candidate; costly, so that it is called about log2(len) times.
        bound: of the loss.
        start: where to look first: what the loss model expects.

    Returns:
        None when none is within the bound that was looked at.
    """
    low, high, probe = 0, len(candidates), start  # the answer lies in [low, high]
    while low < high:
        if measure(candidates[probe]) <= bound:
            high = probe
        else:
            low = probe + 1
        probe = (low + high) // 2
    return candidates[low] if low < len(candidates) else None
