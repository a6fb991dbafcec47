"""What the speed benchmarks share: conditions first, then medians with their spread, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ssmc.runtime.measure.conditions import Conditions, conditions, load_average
from ssmc.runtime.measure.timing import Timing, paired_ratio

FIGURES = Path("docs/figures")
"""Where the plots of the documentation lie; their figures are the JSON in benchmarks/results."""


def print_conditions(dtype: torch.dtype = torch.float32) -> Conditions:
    """Print what the figures below are taken on, and return it for the JSON."""
    now = conditions(torch.device("cpu"), dtype, load_average())
    software = ", ".join(f"{name} {version}" for name, version in now.versions.items())
    print(f"{now.cpu}, {now.physical_cores} cores, {now.torch_threads} threads (torch and our scan), {now.dtype}")
    print(f"{now.system}, Python {now.python}, {software}")
    print(f"load average before the run {now.load_average}; {now.date}\n")
    return now


def print_timings(title: str, timings: Mapping[str, Timing], baseline: str) -> None:
    """One line per contender: median, quartiles, range in ms, and how many times the baseline takes as long."""
    rounds = len(timings[baseline].seconds)
    print(f"{title} ({rounds} interleaved rounds)")
    width = max(map(len, timings))
    for name, timing in timings.items():
        low, high = (1e3 * q for q in timing.quartiles)
        text = f"  {name:<{width}}  {1e3 * timing.median:9.2f} ms   quartiles {low:.2f} .. {high:.2f}"
        if name != baseline:
            ratio = paired_ratio(timings[baseline], timing)
            text += f"   {ratio.median:.2f}x faster than {baseline} ({ratio.low:.2f} .. {ratio.high:.2f})"
        print(text)
    print()


def as_json(timings: Mapping[str, Timing], baseline: str) -> dict[str, dict]:
    """The same for machines, every sample included."""
    return {
        name: {
            "median_s": timing.median,
            "samples_s": timing.seconds,
            "calls_per_sample": timing.calls,
            f"times_faster_than_{baseline}": asdict(paired_ratio(timings[baseline], timing)),
        }
        for name, timing in timings.items()
    }


def write_json(path: Path | None, now: Conditions, settings: Mapping[str, object], results: Mapping[str, dict]) -> None:
    """Write everything to `path`, or nothing when there is none."""
    if path is not None:
        record = {"conditions": asdict(now), "load_after": load_average(), "settings": settings, "results": results}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
