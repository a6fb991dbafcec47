"""docs/methods.md is what the bench of methods writes from its JSON."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.methods import mean_of
from benchmarks.methods_page import page

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results():
    report = json.loads((ROOT / "benchmarks/results/methods.json").read_text("utf-8"))
    assert page(report) == (ROOT / "docs/methods.md").read_text("utf-8")


def test_errors_over_text_and_over_draws_add_up_in_squares():
    run = {"stderr": 0.003, "accuracy": 0.5, "seconds": 1.0, "cpu_seconds": 1.0, "parameters_left": 0.9}
    found = mean_of([{"excess_nats": nats, **run} for nats in (0.01, 0.03)])
    assert found["excess_nats"] == pytest.approx(0.02)
    assert found["stderr"] == pytest.approx(math.hypot(0.003, 0.01))  # of two draws: half their difference
