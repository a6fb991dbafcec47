"""The latency table: what it computes from its figures, and that it times what it says. No test asserts a duration."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure import latency
from ssmc.runtime.measure.latency import LatencyTable, Workload, cut_to_size, measure_latency, read_latency_table
from ssmc.runtime.models.architectures.dimensions import HybridDimensions, Mamba2Dimensions
from ssmc.runtime.models.families import Dimensions, architecture_for
from tests.support.models import logits, random_model, random_tokens

MAMBA = architecture_for("mamba")
WIDTHS, STATES = (32, 64, 128), (1, 4, 16)
SECONDS = ((1.0, 1.5, 2.0), (2.0, 3.5, 5.0), (4.0, 6.0, 11.0))
TABLE = LatencyTable(
    dimensions=Dimensions(4, 64, 128, 16, 4, 4, 256),
    workload=Workload("prefill", 1, 32),
    device="cpu",
    dtype="float32",
    widths=WIDTHS,
    states=STATES,
    block=SECONDS,
    rest=3.0,
    depth=4,
    rounds=6,
    conditions={},
)


@pytest.mark.parametrize("width", [32, 48, 64, 100, 128])
@pytest.mark.parametrize("states", [1, 2, 4, 9, 16])
def test_between_measured_sizes_time_is_linear_along_both_axes(width, states):
    by_states = [np.interp(states, STATES, row) for row in SECONDS]
    assert TABLE.block_seconds(width, states) == pytest.approx(np.interp(width, WIDTHS, by_states))


def test_a_model_is_its_blocks_and_the_rest():
    assert TABLE.seconds([(128, 16), (64, 4), (64, 4)]) == pytest.approx(3 + 11 + 3.5 + 3.5)
    assert TABLE.dense == pytest.approx(3 + 4 * 11)
    assert TABLE.ratio([(32, 1)] * 2) == pytest.approx(5 / 47)


@pytest.mark.parametrize(("width", "states"), [(16, 4), (256, 4), (64, 17), (64, 0)])
def test_nothing_is_guessed_outside_the_table(width, states):
    with pytest.raises(ValueError, match="outside"):
        TABLE.block_seconds(width, states)


def test_a_table_is_read_as_it_was_written(tmp_path):
    TABLE.write(tmp_path / "table.json")
    assert read_latency_table(tmp_path / "table.json") == TABLE


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "ssmc-latency/0"},
        {"block": [[1, 2, 3]]},
        {"block": [[1, 2, 3], [1, 2, 3], [1, 2, -3]]},
        {"widths": [64, 32, 128]},
        {"states": [1, 4, 8]},
        {"workload": {"phase": "prefill"}, "rest": None},
        {"dimensions": {"n_layer": 1}},
        {"more": 1},
    ],
)
def test_a_damaged_table_is_one_sentence(tmp_path, change):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**TABLE.to_json(), **change}))
    with pytest.raises(UsageError, match=r"table\.json is no latency table"):
        read_latency_table(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="is no latency table"):
        read_latency_table(path)


@pytest.mark.parametrize("key", ["goal", "target", None])
@pytest.mark.parametrize(
    "sizes",
    [
        Mamba2Dimensions(4, 64, 128, 16, 8, 4, 256, head_dim=16, n_groups=1),
        HybridDimensions(4, 64, 128, 16, 4, 4, 256, mamba_layers=3),
    ],
)
def test_a_table_of_another_family_is_read_from_a_manifest_of_now_and_of_0_1(tmp_path, sizes, key):
    table, path = replace(TABLE, dimensions=sizes), tmp_path / "ssmc.json"
    path.write_text(json.dumps(table.to_json() if key is None else {key: {"latency_table": table.to_json()}}))
    found = read_latency_table(path)
    assert found == table
    assert type(found.dimensions) is type(sizes)


def test_a_table_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_latency_table(tmp_path / "none.json")


@pytest.mark.parametrize("wrong", [{"phase": "training"}, {"batch": 0}, {"length": 0}])
def test_workloads_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        Workload(**wrong)


def test_a_model_cut_to_its_own_size_is_the_same_model():
    model = random_model()
    same = cut_to_size(model, MAMBA, 3, 48, 6)
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-4, atol=1e-5)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in pointers for p in same.parameters())  # nothing was copied


def test_a_model_cut_to_size_has_the_sizes_of_a_stock_model():
    model = random_model()
    cut = cut_to_size(model, MAMBA, 2, 16, 4)
    stock = random_model(num_hidden_layers=2, intermediate_size=16, state_size=4)
    assert {n: p.shape for n, p in cut.state_dict().items()} == {n: p.shape for n, p in stock.state_dict().items()}
    stock.load_state_dict(cut.state_dict())
    torch.testing.assert_close(logits(cut), logits(stock), rtol=1e-4, atol=1e-5)
    assert torch.equal(random_model().state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_measured_table_covers_every_size_and_adds_up(phase):
    model = random_model(intermediate_size=48)
    table = measure_latency(model, MAMBA, Workload(phase, 2, 9), repeats=2, budget=1)
    assert table.widths == (16, 24, 32, 48)
    assert table.states == (1, 3, 6)
    assert (table.depth, table.rounds, table.device, table.dtype) == (3, 2, "cpu", "float32")
    assert table.rest > 0
    assert all(table.ratio([(w, n)] * 2) > 0 for w in range(16, 49) for n in range(1, 7))
    assert table.conditions["cpu"]


def test_blocks_and_the_rest_are_told_apart():
    """A model whose blocks wait a millisecond each: the clocks stand around the blocks and nowhere else."""
    model = random_model()
    for block in MAMBA.blocks(model):
        block.register_forward_hook(lambda *_: time.sleep(0.002))
    model.backbone.norm_f.register_forward_hook(lambda *_: time.sleep(0.02))
    part = latency._Parts(model, MAMBA, torch.device("cpu"))
    for _ in range(4):
        part.record(lambda: model(random_tokens()))
    for start, begin, end, stop in part.calls:
        assert end - begin >= 0.006
        assert (begin - start) + (stop - end) >= 0.02
    assert 0 < part.share() < 1


def test_large_models_are_timed_with_fewer_blocks(monkeypatch):
    model = random_model()
    size = sum(p.numel() * 4 for p in MAMBA.blocks(model)[0].parameters())
    monkeypatch.setattr(latency, "STACK_BYTES", 2 * size)
    table = measure_latency(model, MAMBA, Workload("prefill", 1, 5), repeats=1, budget=1)
    assert table.depth == 2
    assert table.dense == pytest.approx(table.rest + 3 * table.block_seconds(48, 6))
