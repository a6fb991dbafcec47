"""Loss over time: what every model loses beside how long it takes, so that models of equal speed can be compared."""

# ruff: noqa: RUF001 (typographic dashes are meant)

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.bench.results import Measurement, Model, Results
from ssmc.runtime.bench.summary import MIN_WINDOWS, Row, workload_name

EQUAL = 0.05
"""Times that differ by less than this part are called equal, even where the clock could tell them apart."""


@dataclass(frozen=True)
class Point:
    """One model at one workload.

    Attributes:
        name: of the model.
        time: median over the dense model's, paired by round; below 1 is faster.
        low: of the median's confidence interval.
        high: of the same.
        nats: loss above the dense model's, per token.
        stderr: of `nats`; None for a single window.
    """

    name: str
    time: float
    low: float
    high: float
    nats: float
    stderr: float | None

    def as_fast_as(self, other: Point) -> bool:
        """Whether two models take the same time, as far as this run can tell or anybody would care."""
        overlap = self.low <= other.high and other.low <= self.high
        return overlap or abs(self.time - other.time) <= EQUAL * max(self.time, other.time)


@dataclass(frozen=True)
class TradeOff:
    """All models at one workload, the fastest first."""

    workload: str
    points: tuple[Point, ...]

    @property
    def envelope(self) -> tuple[Point, ...]:
        """Those that no other model beats in both time and loss."""
        return tuple(
            p for p in self.points if not any(o.time <= p.time and o.nats <= p.nats and o != p for o in self.points)
        )


def trade_offs(report: Results) -> tuple[TradeOff, ...]:
    """Loss over time for the longest prefill and for decoding, at the smallest batch; empty without perplexity."""
    if report.dense.perplexity is None or any(model.excess is None for model in report.compressed):
        return ()
    chosen = []
    for kind in ("prefill", "decode"):
        found = report.of_kind(kind)
        chosen += [max((m for m in found if m.batch == found[0].batch), key=lambda m: m.length)] if found else []
    return tuple(_trade_off(report, measurement) for measurement in chosen)


def trade_off_rows(report: Results) -> list[Row]:
    """One line a model: its time over the dense model's at every workload, and its loss; the first the dense one's."""
    offs = trade_offs(report)
    if not offs or len(report.compressed) < 2:
        return []
    points = {(off.workload, point.name): point for off in offs for point in off.points}
    rows = []
    for model in report.models:
        own = [points[off.workload, model.name] for off in offs]
        times = [f"{p.time:.3f} ({p.low:.3f}–{p.high:.3f})" if p.name != report.dense.name else "1" for p in own]
        loss = f"{own[0].nats:+.4f}" + ("" if own[0].stderr is None else f" (±{own[0].stderr:.4f})")
        perplexity = f"{model.perplexity.ppl:.5g}"
        rows.append(Row(model.name, (how(model), *times, perplexity, loss), (), ()))
    return rows


def trade_off_columns(report: Results) -> tuple[str, ...]:
    """What stands above the figures of `trade_off_rows`."""
    return (
        "what was removed",
        *(off.workload for off in trade_offs(report)),
        "perplexity",
        "excess loss, nats",
    )


def trade_off_findings(report: Results) -> list[str]:
    """Who is best at its speed, and what models of equal speed lose, in sentences."""
    if len(report.compressed) < 2:
        return []
    sentences = []
    for off in trade_offs(report):
        best = ", ".join(point.name for point in off.envelope)
        sentences.append(f"{off.workload}: no other model has both less time and less loss than these: {best}.")
        others = [point for point in off.points if point.name != report.dense.name]
        for i, one in enumerate(others):
            for other in others[i + 1 :]:
                if one.as_fast_as(other):
                    sentences.append(_equal_speed(off.workload, one, other, report))
    return sentences


def how(model: Model) -> str:
    """How a model came about, in a few words."""
    if model.dense:
        return "dense"
    if model.smaller:
        return "a smaller dense model"
    if not model.recipe:
        return "not known"
    recipe = dict(model.recipe)
    words = [_by_part(recipe.get(key)) for key in ("pattern", "sparsity", "score") if recipe.get(key) is not None]
    return ", ".join(words) + ("" if "repair" not in recipe else ", repaired" if recipe["repair"] else ", not repaired")


def _by_part(value: object) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _trade_off(report: Results, measurement: Measurement) -> TradeOff:
    points = [Point(report.dense.name, 1.0, 1.0, 1.0, 0.0, None)]
    for model in report.compressed:
        if model.name not in measurement.ratios:  # it does not take so many sequences at once
            continue
        ratio = measurement.ratios[model.name]  # dense over compressed
        times = (1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
        points.append(Point(model.name, *times, model.excess.nats, model.excess.stderr))
    return TradeOff(workload_name(measurement), tuple(sorted(points, key=lambda p: (p.time, p.nats))))


def _equal_speed(workload: str, one: Point, other: Point, report: Results) -> str:
    better, worse = sorted((one, other), key=lambda p: p.nats)
    noise = 2.4 * ((better.stderr or 0) ** 2 + (worse.stderr or 0) ** 2) ** 0.5
    few = report.dense.perplexity.windows < MIN_WINDOWS
    unsure = ", a difference within the noise of this text" if few or worse.nats - better.nats <= noise else ""
    return (
        f"At equal time ({workload}: {better.name} {better.time:.2f}, {worse.name} {worse.time:.2f} of the dense "
        f"model's), {better.name} loses {better.nats:+.4f} nats and {worse.name} {worse.nats:+.4f}{unsure}."
    )
