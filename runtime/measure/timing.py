"""Fair timings: the contenders take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
"""Names of what is timed, or whatever else tells the contenders apart."""

MIN_ROUNDS = 6
"""Fewer rounds give no confidence interval worth the name: the range of 6 holds the median with 97 %."""

MIN_SAMPLE = 0.02
"""Seconds one sample lasts at least; shorter calls are repeated, or the clock and the scheduler are what is timed."""

WARM_UPS = {"cpu": 1, "cuda": 3}
"""Untimed calls: on a CPU the first compiles and touches all there is, on a GPU libraries choose kernels over a few."""

CONFIDENCE = 0.95


class Elapsed(float):
    """Seconds that what was called measured itself: it computes elsewhere, and asking takes time, too."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one figure a round.

    Attributes:
        seconds: every sample, in the order of the rounds; those of two contenders in one round were taken together.
        calls: how many calls each sample is the mean of.
    """

    seconds: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, the spread."""
        return quantile(self.seconds, 0.25), quantile(self.seconds, 0.75)


@dataclass(frozen=True)
class Ratio:
    """How many times one quantity is another: median of the ratios of single rounds, and where that median lies.

    `low` and `high` are the order statistics that hold the median with at least 95 % (of 6 to 8 rounds, and of fewer,
    which hold it with less: the extremes).
    """

    median: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower"; "no difference" when the interval holds 1, so that the noise is larger than any;
        "unclear" after fewer than MIN_ROUNDS rounds."""
        if self.rounds < MIN_ROUNDS:
            return "unclear"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


def interleave(
    contenders: Mapping[K, Callable[[], object]],
    device: torch.device,
    repeats: int,
    budget: float,
    *,
    calls: int | None = None,
    sample: float = MIN_SAMPLE,
    prepare: Mapping[K, Callable[[], object]] | None = None,
) -> dict[K, Timing]:
    """Time several callables in turns: A, B, B, A, A, B, ...

    Every contender is called untimed first (compilation, allocation, caches). Rounds end after `repeats`, or earlier
    when the next one would exceed the budget, but not before MIN_ROUNDS (or `repeats`, if that is less).

    Args:
        contenders: name -> what to time.
        device: whose work to wait for.
        repeats: rounds at most.
        budget: seconds for all rounds together, warm-up aside.
        calls: calls per sample; None takes as many as make a sample of `sample` seconds.
        sample: seconds.
        prepare: name -> what to call, untimed, before every sample of a contender.
    """
    prepare = prepare or {}
    warm = {
        name: _calls_per_sample(run, device, prepare.get(name, _nothing), sample) for name, run in contenders.items()
    }
    per_sample = {name: calls or warm[name] for name in contenders}
    names = list(contenders)
    samples: dict[K, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for done in range(1, repeats + 1):
        for name in names if done % 2 else reversed(names):
            prepare.get(name, _nothing)()
            samples[name].append(clock(contenders[name], device, per_sample[name]))
        spent = time.perf_counter() - started
        if done >= MIN_ROUNDS and spent + spent / done > budget:
            break
    return {name: Timing(tuple(seconds), per_sample[name]) for name, seconds in samples.items()}


def clock(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Mean seconds of a call: CUDA events on a GPU, what it measured itself (`Elapsed`), else the monotonic clock."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    own = [found for _ in range(calls) if isinstance(found := run(), Elapsed)]
    return sum(own) / calls if len(own) == calls else (time.perf_counter() - begin) / calls


def paired_ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """The ratio of two interleaved timings, round by round."""
    ratios = sorted(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))
    rank = median_interval(len(ratios))
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank], len(ratios))


def median_interval(count: int) -> int:
    """The largest k for which the k-th smallest and k-th largest of `count` samples enclose the true median with
    CONFIDENCE; 0, the extremes, where even those do not.

    A sample lies below the median like a coin falls, so the chance that they fail to is 2 P(Binomial(count, 1/2) <= k).
    """
    tail, best = 0.0, 0
    for k in range((count + 1) // 2):
        tail += math.comb(count, k) / 2**count
        if 1 - 2 * tail < CONFIDENCE:
            break
        best = k
    return best


def quantile(values: tuple[float, ...], share: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _calls_per_sample(
    run: Callable[[], object], device: torch.device, prepare: Callable[[], object], sample: float
) -> int:
    """Warm up, then find out how many calls make a sample long enough to time."""
    for _ in range(WARM_UPS[device.type]):
        prepare()
        run()  # may compile, so its time says nothing
    prepare()
    return max(1, math.ceil(sample / clock(run, device)))


def _nothing() -> None:
    pass
