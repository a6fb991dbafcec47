"""All timings of a benchmark: every workload on every model, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ssmc.runtime.bench.results import Measurement
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.measure import workloads
from ssmc.runtime.measure.sources import Subject
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

STOCK_TOKENS = 256
"""Tokens of transformers' own loop over time steps at most: it takes seconds where ours takes milliseconds."""

OURS, STOCK = "ssmc scan", "transformers' own loop"


@dataclass(frozen=True)
class _Cell:
    """One workload to time: `make` builds what is run from a subject."""

    kind: str
    length: int
    batch: int
    make: Callable[[Subject], Callable[[], object]]


def measure_speed(
    subjects: Sequence[Subject], settings: Settings, device: torch.device, stock: bool, progress: Progress = NO_PROGRESS
) -> list[Measurement]:
    """Time prefill, decoding and the scan of all subjects, which are on `device` and use our scan.

    The ratios are the first subject's time over the others'. `stock` adds the first one with transformers' own loop.
    """
    cells = _cells(settings)
    stock = stock and subjects[0].runtime == "torch"
    budget = settings.time_budget / (len(cells) + stock)
    measurements = []
    for done, cell in enumerate(cells):
        progress(f"timing {cell.kind}, {cell.length} x {cell.batch} tokens", done, len(cells) + stock)
        run = [subject for subject in subjects if _takes(subject, cell)]
        if not run or (run[0] is not subjects[0] and cell.kind != "scan"):  # nothing to compare with
            continue
        timings = interleave(
            {subject.source.name: cell.make(subject) for subject in run},
            device,
            settings.repeats,
            budget,
            calls=settings.decode_tokens if cell.kind == "decode" else None,
        )
        dense, *others = timings
        ratios = {name: paired_ratio(timings[dense], timings[name]) for name in others}
        measurements.append(Measurement(cell.kind, cell.length, cell.batch, timings, ratios))
    if stock:
        progress("timing transformers' own loop", len(cells), len(cells) + 1)
        measurements.append(_time_stock(subjects[0], settings, device, budget))
    progress("timing", len(cells) + stock, len(cells) + stock)
    return measurements


def _takes(subject: Subject, cell: _Cell) -> bool:
    """Whether a subject has this workload: parts of graphs and files cannot be timed alone, some take one sequence."""
    if subject.runtime != "torch" and cell.kind == "scan":
        return False
    return subject.max_batch is None or cell.batch <= subject.max_batch


def _cells(settings: Settings) -> list[_Cell]:
    """All workloads, by kind."""
    small = min(settings.batch_sizes)

    def prefill(batch: int, length: int) -> Callable[[Subject], Callable[[], object]]:
        return lambda s: workloads.prefill(s.checkpoint.model, batch, length)

    def decode(batch: int) -> Callable[[Subject], Callable[[], object]]:
        return lambda s: workloads.decode(s.checkpoint.model, batch)

    def scan(length: int) -> Callable[[Subject], Callable[[], object]]:
        return lambda s: workloads.scan(s.checkpoint.model, s.checkpoint.architecture, small, length, settings.backend)

    return [
        *(_Cell("prefill", n, b, prefill(b, n)) for n, b in workloads.grid(settings.lengths, settings.batch_sizes)),
        *(_Cell("decode", 1, b, decode(b)) for b in settings.batch_sizes),
        *(_Cell("scan", n, small, scan(n)) for n in settings.lengths),
    ]


def _time_stock(dense: Subject, settings: Settings, device: torch.device, budget: float) -> Measurement:
    """The dense model with transformers' own loop and with our scan, in turns."""
    model, batch = dense.checkpoint.model, min(settings.batch_sizes)
    length = min(*settings.lengths, STOCK_TOKENS)
    run = workloads.prefill(model, batch, length)
    switch = {STOCK: lambda: use_stock_scan(model), OURS: lambda: use_fast_scan(model, backend=settings.backend)}
    try:
        timings = interleave({STOCK: run, OURS: run}, device, settings.repeats, budget, prepare=switch)
    finally:
        switch[OURS]()
    return Measurement("stock", length, batch, timings, {OURS: paired_ratio(timings[STOCK], timings[OURS])})
