"""Measure the dense model beside the compressed ones: sizes, memory, speed, perplexity, and the conditions of it all.

report = benchmark("ssmc-out")
report.write("ssmc-out")        # bench.json and bench.html
summary_rows(report)            # the overview as formatted rows, for a terminal
findings(report)                # the outcome in sentences
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.bench.run": "benchmark",
        "ssmc.runtime.bench.report": "Report check_output",
        "ssmc.runtime.bench.results": "Measurement Model",
        "ssmc.runtime.bench.summary": "Row findings summary_rows",
        "ssmc.runtime.measure.latency": "LatencyTable Workload measure_latency read_latency_table time_sizes",
        "ssmc.runtime.measure.timing": "Ratio",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
