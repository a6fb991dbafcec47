"""Standard errors of scores, and of differences between two models that were scored on the same documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmc.runtime.measure.perplexity import mean_and_stderr

RESAMPLES = 1000
"""Bootstrap samples; a standard error from 1000 is itself off by about 2 %."""

SLOW_RESAMPLES = 100
"""The same for metrics that compare whole corpora, as many as lm-eval draws for them."""

Aggregate = Callable[[list[Any]], float]
"""Makes one score of the values of all documents."""


@dataclass(frozen=True)
class Difference:
    """How far a model's score lies above the reference's on the same documents.

    Attributes:
        value: the model's score minus the reference's.
        stderr: its standard error over paired documents; None for a single document.
    """

    value: float
    stderr: float | None


def standard_error(values: Sequence[Any], aggregate: Aggregate | None, resamples: int = RESAMPLES) -> float | None:
    """Standard error of a score.

    Args:
        values: of every document.
        aggregate: makes the score of them; None is the mean, which has a closed form, anything else is bootstrapped.
        resamples: bootstrap samples.

    Returns:
        None for a single document.
    """
    if aggregate is None:
        return mean_and_stderr(list(values))[1]
    return _bootstrap(lambda rows: _pick(values, rows, aggregate), len(values), resamples)


def paired_difference(
    values: Sequence[Any], reference: Sequence[Any], aggregate: Aggregate | None, resamples: int = RESAMPLES
) -> Difference:
    """The score of `values` minus that of `reference`, both of the same documents in the same order.

    Pairing takes the difficulty of the documents out of the standard error: for a mean it is that of the mean of the
    differences; otherwise every bootstrap sample draws the same documents for both.

    Args:
        values, reference, aggregate, resamples: see `standard_error`.
    """
    if len(values) != len(reference):
        raise ValueError("the two models were scored on different documents")
    if aggregate is None:
        return Difference(*mean_and_stderr([ours - theirs for ours, theirs in zip(values, reference, strict=True)]))

    def difference(rows: list[int]) -> float:
        return _pick(values, rows, aggregate) - _pick(reference, rows, aggregate)

    return Difference(difference(list(range(len(values)))), _bootstrap(difference, len(values), resamples))


def exp_mean(values: list[float]) -> float:
    """Perplexity from losses in nats."""
    mean = math.fsum(values) / len(values)
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is beyond float64


def _pick(values: Sequence[Any], rows: list[int], aggregate: Aggregate) -> float:
    return float(aggregate([values[row] for row in rows]))


def _bootstrap(statistic: Callable[[list[int]], float], count: int, resamples: int) -> float | None:
    """Standard deviation of a statistic over documents drawn with replacement; the same draws every time."""
    if count == 1:
        return None
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(count, size=count).tolist()) for _ in range(resamples)]
    return float(np.std(drawn, ddof=1)) if np.isfinite(drawn).all() else None
