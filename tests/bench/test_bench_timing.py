"""Fair timing and what is timed. No test asserts how long anything takes, only that it was measured."""

import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.measure import timing
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.timing import MIN_ROUNDS, Timing, clock, interleave, median_interval, paired_ratio, quantile
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.scan import selective_scan

CPU = torch.device("cpu")


def random_model() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=67, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32, time_step_rank=2
    )
    return MambaForCausalLM(config).eval()


def test_contenders_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "AB"}
    prepare = {name: lambda name=name: calls.append(name.lower()) for name in "AB"}
    timings = interleave(runs, CPU, 6, 10, calls=2, prepare=prepare)
    assert "".join(calls).endswith("aAAbBB" + "bBBaAA" + "aAAbBB" + "bBBaAA" + "aAAbBB" + "bBBaAA")
    assert all(len(timing.seconds) == 6 and timing.calls == 2 for timing in timings.values())
    assert "".join(calls[:8]) == "aAaAbBbB"  # the warm-up, untimed


def test_rounds_end_with_the_budget_but_not_too_early():
    assert len(interleave({"A": lambda: None}, CPU, 50, 0)["A"].seconds) == MIN_ROUNDS
    assert len(interleave({"A": lambda: None}, CPU, 9, 60, calls=1)["A"].seconds) == 9
    assert len(interleave({"A": lambda: None}, CPU, 2, 0)["A"].seconds) == 2


def test_short_calls_are_repeated_and_long_ones_are_not():
    timings = interleave({"long": lambda: time.sleep(0.03), "short": lambda: None}, CPU, MIN_ROUNDS, 0)
    assert timings["long"].calls == 1
    assert timings["short"].calls > 1000
    assert min(timings["long"].seconds) >= 0.03
    assert clock(lambda: time.sleep(0.01), CPU) >= 0.01


def test_a_sample_is_the_mean_of_its_calls(monkeypatch):
    ticks = iter([1.0, 4.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    calls = []
    assert clock(lambda: calls.append(1), CPU, calls=6) == 0.5
    assert len(calls) == 6


@pytest.mark.parametrize("count", range(1, 16))
def test_the_interval_holds_the_median_with_95_percent(count):
    """Every way `count` samples can fall below or above the true median, counted out."""

    def coverage(rank):
        below = np.array([sum(sides) for sides in product((0, 1), repeat=count)])
        return np.mean((below > rank) & (count - below > rank))

    rank = median_interval(count)
    assert rank == 0 or coverage(rank) >= 0.95
    assert rank + 1 > (count - 1) // 2 or coverage(rank + 1) < 0.95
    if count >= MIN_ROUNDS:
        assert coverage(rank) >= 0.95


def test_ratios_are_paired_and_noise_is_called_noise():
    dense = Timing((2.0, 4.0, 6.0, 8.0, 10.0, 12.0))
    twice = paired_ratio(dense, Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert (twice.median, twice.low, twice.high, twice.verdict) == (2, 2, 2, "faster")
    assert paired_ratio(dense, Timing((3.0, 5.0, 7.0, 9.0, 11.0, 13.0))).verdict == "slower"
    noise = paired_ratio(dense, Timing((1.0, 2.0, 3.0, 4.0, 11.0, 6.0)))
    assert (noise.median, noise.low, noise.verdict) == (2, 10 / 11, "no difference")
    few = paired_ratio(Timing((2.0,) * (MIN_ROUNDS - 1)), Timing((1.0,) * (MIN_ROUNDS - 1)))
    assert few.verdict == "unclear"
    assert dense.median == 7
    values = (3.0, 1.0, 7.5, 2.0)
    assert quantile(values, 0.25) == pytest.approx(np.quantile(values, 0.25))
    assert Timing(values).quartiles == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])))


def test_grid_keeps_large_batches_to_what_the_longest_prefill_costs():
    assert work.grid((128, 512, 2048), (1, 8)) == [(128, 1), (512, 1), (2048, 1), (128, 8)]
    assert work.grid((512, 128), (4, 1)) == [(128, 1), (512, 1), (128, 4)]
    assert work.grid((16,), (8,)) == [(16, 8)]


def test_workloads_do_what_they_say():
    model = random_model()
    tokens = work.random_tokens(model, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(work.prefill(model, 3, 12)(), model(tokens).logits[:, -1:])
        step = work.decode(model, 3)
        prompt, following = work.random_tokens(model, 3, work.PROMPT), work.random_tokens(model, 3, 1)
        for steps in (1, 2, 3):
            whole = model(torch.cat([prompt, *[following] * steps], dim=1)).logits[:, -1:]
            torch.testing.assert_close(step(), whole, atol=1e-5, rtol=1e-5)


def test_the_scan_is_that_of_the_first_layer():
    model = random_model()
    tokens = work.random_tokens(model, 2, 12)
    architecture, block = architecture_for("mamba"), model.backbone.layers[0]
    with torch.no_grad():
        y, _ = selective_scan(work.first_scan_inputs(model, architecture, tokens), backend="reference")
        expected = block.mixer(block.norm(model.backbone.embeddings(tokens)))
        torch.testing.assert_close(block.mixer.out_proj(y), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(work.scan(model, architecture, 2, 12, "auto")(), y, atol=1e-5, rtol=1e-4)
