"""`ssmc bench` and `ssmc eval` on a Mamba-2, dense beside pruned, against stock transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import Mamba2ForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.bench import benchmark
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.measure.timing import MIN_ROUNDS
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.tokenizers import copy_tokenizer, load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import TINY_DIRECTORY, heldout_path
from tests.support.models import random_mamba2, save_transformers

SMALL = {"lengths": (8, 16), "batch_sizes": (1, 3), "decode_tokens": 4, "repeats": MIN_ROUNDS, "time_budget": 0.1}
WINDOW, WINDOWS = 64, 5
OPTIONS = {"column": {"pattern": "column"}, "heads": {"pattern": "channel"}}


@pytest.fixture(scope="module", params=OPTIONS)
def artefact(request, tmp_path_factory):
    """A dense Mamba-2 with a tokenizer, pruned, and both of its exports."""
    base = tmp_path_factory.mktemp(request.param)
    dense = save_transformers(random_mamba2(vocab_size=4096), base / "dense")
    copy_tokenizer(TINY_DIRECTORY, dense)
    options = {"score": "random", "repair": False, **OPTIONS[request.param]}
    compress(dense, out=base / "ssmc-out", **options)
    for format in ("safetensors", "mamba-ssm"):
        export(base / "ssmc-out", format=format)
    return base / "ssmc-out"


def stock_models(artefact) -> list[Mamba2ForCausalLM]:
    folders = (artefact.parent / "dense", artefact / "safetensors")
    return [Mamba2ForCausalLM.from_pretrained(folder).eval() for folder in folders]


def stock_losses(artefact) -> list[np.ndarray]:
    """Of each window, by transformers' own forward."""
    stream = tokenize(read_texts(heldout_path()), load_tokenizer(load_checkpoint(artefact.parent / "dense")))
    text = stream[: WINDOWS * WINDOW]
    return [np.array(perplexity(model, text, WINDOW).window_nll) for model in stock_models(artefact)]


@pytest.mark.parametrize("artefact", ["column"], indirect=True)  # every model is run in a process of its own
def test_bench_measures_a_mamba2(artefact):
    report = benchmark(artefact, **SMALL, window=WINDOW, max_windows=WINDOWS)
    dense, pruned = report.models
    for model, stock in zip(report.models, stock_models(artefact), strict=True):
        assert model.parameters == sum(p.numel() for p in stock.parameters())
        assert model.dimensions.heads == stock.config.num_heads
        cache = stock(torch.zeros(1, 1, dtype=torch.long), use_cache=True).cache_params
        states = [s for layer in cache.layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        assert model.state_bytes == sum(s.numel() * 4 for s in states)
    assert {file.name for file in pruned.files} == {"ssmc-out/safetensors", "ssmc-out/mamba-ssm"}
    assert pruned.parameters < dense.parameters
    assert [m.part for m in report.of_kind("part")] == ["in_proj", "conv1d", "scan", "out_proj", "head"]
    kinds = [(m.kind, m.length, m.batch) for m in report.measurements if m.kind != "part"]
    assert kinds[:5] == [("prefill", 8, 1), ("prefill", 16, 1), ("prefill", 8, 3), ("decode", 1, 1), ("decode", 1, 3)]
    losses = stock_losses(artefact)
    for model, loss in zip(report.models, losses, strict=True):
        assert model.perplexity.nll_per_token == pytest.approx(loss.mean(), abs=1e-5)
    difference = losses[1] - losses[0]
    assert pruned.excess.nats == pytest.approx(difference.mean(), abs=1e-5)
    assert pruned.excess.stderr == pytest.approx(difference.std(ddof=1) / WINDOWS**0.5, abs=1e-5)


def test_eval_scores_a_mamba2(artefact, tmp_path):
    pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")
    from ssmc.runtime.evaluation import evaluate_models  # imports lm_eval

    row = {"goal": "Swim.", "sol1": "Jump into the lake.", "sol2": "Jump into the stone.", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    options = {"data": tmp_path, "text": heldout_path(), "window": WINDOW, "max_windows": WINDOWS, "device": "cpu"}
    report = evaluate_models([artefact], "piqa", **options)
    losses = stock_losses(artefact)
    for model, loss in zip(report.models, losses, strict=True):
        found, *tasks = model.scores
        assert found.value == pytest.approx(float(np.exp(loss.mean())), rel=1e-5)
        assert [score.metric for score in tasks] == ["acc", "acc_norm"]


@torch.no_grad()
def test_the_mamba_ssm_layout_round_trips_after_pruning(artefact, tmp_path):
    """Pruned and exported to it, read, pruned on from there and exported to transformers' layout: the same model."""
    written = load_checkpoint(artefact / "mamba-ssm")
    stock = stock_models(artefact)[1]
    for name, tensor in written.model.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name]), name
    compress(artefact / "mamba-ssm", out=tmp_path / "out", score="random", repair=False, sparsity=0.34)
    export(tmp_path / "out", format="mamba-ssm")
    export(tmp_path / "out", format="safetensors")
    last = Mamba2ForCausalLM.from_pretrained(tmp_path / "out" / "safetensors")
    assert last.config.state_size < stock.config.state_size
    raw = json.loads((tmp_path / "out" / "mamba-ssm" / "config.json").read_text())["ssm_cfg"]
    assert (raw["d_state"], raw["headdim"]) == (last.config.state_size, last.config.head_dim)
    for name, tensor in load_checkpoint(tmp_path / "out" / "mamba-ssm").model.state_dict().items():
        assert torch.equal(tensor, last.state_dict()[name]), name
