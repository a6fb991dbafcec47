"""Loss over time: who beats whom, what models of equal speed lose, and plain smaller models beside them."""

import json
import shutil
import sys

import pytest

from ssmc.runtime.bench import benchmark
from ssmc.runtime.bench.html import render
from ssmc.runtime.bench.report import Report
from ssmc.runtime.bench.results import Measurement, Model
from ssmc.runtime.bench.tradeoff import Point, TradeOff, how, trade_off_columns, trade_off_findings, trade_off_rows
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.measure.memory import MemoryProcessError
from ssmc.runtime.measure.perplexity import ExcessLoss, Perplexity
from ssmc.runtime.measure.sources import find_sources
from ssmc.runtime.measure.timing import Ratio
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from tests.support.models import random_model, save_transformers, write_manifest

SCORE = Perplexity(2.0, 7.39, 630, 10, 64, 0.01, (2.0,) * 10)


def model(name, nats=None, recipe=None, smaller=False):
    excess = None if nats is None else ExcessLoss(nats, 0.001)
    dense = nats is None
    return Model(name, dense, recipe, "float32", None, 1, (), 1, None, SCORE, excess, smaller=smaller)


def report(times, losses, recipes=None):
    """Models "b", "c", ... beside a dense "a"; times over the dense one's, known to 1 %."""
    names = [chr(ord("b") + i) for i in range(len(times))]
    models = (model("a"), *(model(n, loss, (recipes or {}).get(n)) for n, loss in zip(names, losses, strict=True)))
    ratios = {n: Ratio(1 / t, 1 / (1.01 * t), 1 / (0.99 * t), 9) for n, t in zip(names, times, strict=True)}
    measured = [Measurement("prefill", 16, 1, {}, {}), Measurement("prefill", 64, 1, {}, ratios)]
    return Report(None, None, None, models, (*measured, Measurement("decode", 1, 1, {}, ratios)), (), None)


def test_the_envelope_is_what_no_other_model_beats():
    times, losses = [0.5, 0.6, 0.7, 0.8, 0.9], [0.4, 0.1, 0.2, 0.05, 0.3]
    points = tuple(Point(str(t), t, t, t, loss, 0.0) for t, loss in zip(times, losses, strict=True))
    assert [p.time for p in TradeOff("", points).envelope] == [0.5, 0.6, 0.8]


def test_findings_name_the_envelope_and_compare_models_of_equal_speed():
    sentences = trade_off_findings(report([0.60, 0.62, 0.9], [0.1, 0.3, 0.2]))
    assert (
        sentences[0] == "Prefill, 64 tokens, batch 1: no other model has both less time and less loss than these: b, a."
    )
    assert "b 0.60, c 0.62 of the dense model's), b loses +0.1000 nats and c +0.3000." in sentences[1]
    assert len(sentences) == 4  # the same for decoding; c and d are not equally fast


def test_a_difference_within_the_noise_is_called_that():
    sentences = trade_off_findings(report([0.60, 0.60], [0.1, 0.102]))
    assert sentences[1].endswith("a difference within the noise of this text.")


def test_rows_show_time_and_loss_of_every_model():
    recipe = {"pattern": "column+channel", "sparsity": {"column": 0.75, "channel": 0.5}, "score": None, "repair": True}
    made = report([0.5, 0.8], [0.1, 0.3], {"b": recipe})
    rows = trade_off_rows(made)
    assert trade_off_columns(made)[1:3] == ("Prefill, 64 tokens, batch 1", "Decode, batch 1")
    assert [row.metric for row in rows] == ["a", "b", "c"]
    assert rows[0].values[:3] == ("dense", "1", "1")
    assert rows[1].values[0] == "column+channel, column=0.75 channel=0.5, repaired"
    assert rows[1].values[1].startswith("0.500 (0.495")
    assert rows[1].values[-1] == "+0.1000 (±0.0010)"
    assert all(len(row.values) == len(trade_off_columns(made)) for row in rows)


def test_how_says_how_a_model_came_about():
    assert how(model("m", 0.1, smaller=True)) == "a smaller dense model"
    assert how(model("m", 0.1, {"pattern": "column", "sparsity": 0.5, "score": "sparsessm-vote", "repair": False})) == (
        "column, 0.5, sparsessm-vote, not repaired"
    )


def test_a_single_compressed_model_needs_no_comparison():
    made = report([0.5], [0.1])
    assert trade_off_rows(made) == []
    assert trade_off_findings(made) == []


@pytest.fixture
def folder(tmp_path):
    """A dense model with a tokenizer, one with half of its states and a manifest, a smaller dense one."""
    dense = random_model(vocab_size=4096)
    tiny = load_checkpoint("tiny").directory
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    cut, config, _ = architecture_for("mamba").cut(tensors, dense.config, STATE, [[0, 2, 4]] * 3)
    for name, state, c in (("dense", tensors, dense.config), ("cut", cut, config)):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, state, c)
    write_manifest(tmp_path / "cut", {"kind": "export", "source": {}, "config": {"pattern": "column", "sparsity": 0.5}})
    save_transformers(random_model(vocab_size=4096, hidden_size=16), tmp_path / "plain")
    for name in ("dense", "plain"):
        shutil.copy(tiny / "tokenizer.json", tmp_path / name)
    return tmp_path


def test_sources_of_smaller_models_come_last(folder):
    found = find_sources("", dense=folder / "dense", models=[folder / "cut"], smaller=[folder / "plain"])
    assert [(s.name, s.dense, s.smaller) for s in found] == [
        ("dense", True, False),
        ("cut", False, False),
        ("plain", False, True),
    ]
    assert found[1].recipe == {"pattern": "column", "sparsity": 0.5}


def test_a_smaller_dense_model_stands_beside_the_compressed_one(folder, monkeypatch):
    def no_memory(task):
        raise MemoryProcessError("left out here")

    monkeypatch.setattr(sys.modules["ssmc.runtime.bench.run"], "measure_memory", no_memory)
    options = {"lengths": (8,), "batch_sizes": (1,), "decode_tokens": 2, "repeats": 2, "time_budget": 0.1}
    measured = benchmark(
        dense=folder / "dense",
        models=[folder / "cut"],
        smaller=[folder / "plain"],
        window=64,
        max_windows=3,
        stock=False,
        **options,
    )
    rows = trade_off_rows(measured)
    assert [row.values[0] for row in rows] == ["dense", "column, 0.5", "a smaller dense model"]
    page = render(measured)
    assert "Loss over time" in page
    assert "a smaller dense model" in page
    assert "no other model has both less time and less loss" in page
    assert [m["smaller"] for m in measured.to_json()["models"]] == [False, False, True]


def test_losses_of_other_tokens_are_not_compared(folder):
    path = folder / "plain" / "tokenizer.json"
    other = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = other["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(CheckpointError, match="plain cuts text into other tokens than the dense model"):
        benchmark(dense=folder / "dense", models=[folder / "cut"], smaller=[folder / "plain"], lengths=(8,))
