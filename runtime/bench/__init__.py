"""Measure the dense model beside the compressed ones: sizes, memory, speed, perplexity, and the conditions of it all.

report = benchmark("ssmc-out")
report.write("ssmc-out")        # bench.json and bench.html
summary_rows(report)            # the overview as formatted rows, for a terminal
findings(report)                # the outcome in sentences
"""

from ssmc.runtime.bench.benchmark import benchmark
from ssmc.runtime.bench.report import Measurement, Model, Report, check_output
from ssmc.runtime.bench.summary import Row, findings, summary_rows
from ssmc.runtime.measure.latency import LatencyTable, Workload, measure_latency, read_latency_table, time_sizes
from ssmc.runtime.measure.timing import Ratio

__all__ = [
    "LatencyTable",
    "Measurement",
    "Model",
    "Ratio",
    "Report",
    "Row",
    "Workload",
    "benchmark",
    "check_output",
    "findings",
    "measure_latency",
    "read_latency_table",
    "summary_rows",
    "time_sizes",
]
