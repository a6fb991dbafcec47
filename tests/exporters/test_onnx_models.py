"""Exports to ONNX beside the same models in torch: sessions, text, perplexity, tasks, benchmark."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("onnxruntime", reason="ONNX exports need the extra `onnx`")

from ssmc.cli import main
from ssmc.exporters import export
from ssmc.runtime.bench import benchmark, findings, summary_rows
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.measure.memory import MemoryProcessError
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.measure.sources import find_sources, runnable
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import (
    OnnxSession,
    TorchSession,
    generate,
    generate_batch,
    load_onnx_export,
    open_session,
)
from ssmc.runtime.models.generation.onnx_graph import open_graph
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from tests.support.commandline import run
from tests.support.models import random_tokens

PROMPTS = ("Once upon a time", "The dog", "One day, a girl named Lily went to the")
PIQA = [
    {"goal": "Find a small planet.", "sol1": "Look at the sky at night.", "sol2": "Purple the of.", "label": 0},
    {"goal": "Feed a dog.", "sol1": "It.", "sol2": "Put some food in a bowl for the dog to eat.", "label": 1},
    {"goal": "Swim.", "sol1": "Jump into the lake.", "sol2": "Jump into the stone.", "label": 0},
]


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory):
    """The embedded model, exported as it is; its graph gives the last token's logits."""
    return export("tiny", format="onnx", out=tmp_path_factory.mktemp("exports") / "tiny-onnx").directory


@pytest.fixture(scope="module")
def random_onnx(model_directory, tmp_path_factory):
    return export(model_directory(), format="onnx", out=tmp_path_factory.mktemp("exports") / "random-onnx").directory


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A compressed model with an export for torch and one for onnxruntime."""
    out = tmp_path_factory.mktemp("artefact") / "ssmc-out"
    assert main(["compress", "tiny", "--score", "magnitude", "--no-repair", "--quiet", "--out", str(out)]) == 0
    export(out)
    export(out, format="onnx")
    return out


@pytest.fixture(scope="module")
def stream(tiny):
    return tokenize(read_texts(heldout_path()), open_session("tiny", device="cpu").tokenizer)[: 4 * 256]


# --- sessions and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_and_torch_sessions_agree_teacher_forced(random_onnx, model_directory, batch):
    """Prefill, more prefill, 64 steps: both read the same tokens, so that no difference grows by a different choice."""
    ours, theirs = (open_session(path, device="cpu").session for path in (random_onnx, model_directory()))
    assert isinstance(ours, OnnxSession)
    assert isinstance(theirs, TorchSession)
    tokens = random_tokens((batch, 80))
    calls = [("prefill", tokens[:, :10]), ("prefill", tokens[:, 10:11]), ("prefill", tokens[:, 11:16])]
    calls += [("step", tokens[:, position]) for position in range(16, 80)]
    for name, piece in calls:
        got, wanted = (getattr(session, name)(piece) for session in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_travels_and_the_text_is_the_same(tiny_onnx):
    ours, theirs = open_session(tiny_onnx, device="cpu"), open_session("tiny", device="cpu")
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.stop_tokens == theirs.stop_tokens
    for prompt in PROMPTS:
        writing = generate(ours, prompt, max_new_tokens=30)
        assert "".join(writing) == "".join(generate(theirs, prompt, max_new_tokens=30))
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 1, "max_new_tokens": 12}
    assert generate_batch(ours, PROMPTS, **drawn) == generate_batch(theirs, PROMPTS, **drawn)


def test_the_command_runs_an_export(capsys, tiny_onnx):
    text = "".join(generate("tiny", PROMPTS[0], max_new_tokens=6))
    outcome = run(capsys, "generate", tiny_onnx, PROMPTS[0], "--max-new-tokens", 6)
    assert outcome.out == PROMPTS[0] + text + "\n"
    assert "tiny-onnx, onnx: read 4 tokens" in outcome.err


def test_what_only_torch_reads_says_so(tiny_onnx):
    with pytest.raises(CheckpointError, match="export to ONNX"):
        load_checkpoint(tiny_onnx)


def test_of_an_artefact_the_export_for_torch_is_opened(artefact):
    loaded = open_session(artefact, device="cpu")
    assert loaded.where == str(artefact / "safetensors")
    assert loaded.session.model.config.state_size == 8


# --- perplexity and tasks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_logits", [True, False], ids=["in one pass", "token by token"])
def test_perplexity_equals_torchs(tiny, tiny_onnx, stream, all_logits):
    wanted = perplexity(use_fast_scan(tiny.model), stream, 256)
    model = OnnxSession(open_graph(tiny_onnx, "cpu", all_logits=all_logits))
    assert model.graph.all_logits == all_logits
    got = perplexity(model, stream, 256)
    assert f"{got.ppl:.4g}" == f"{wanted.ppl:.4g}"
    assert got.window_nll == pytest.approx(wanted.window_nll, abs=1e-5)
    assert (got.tokens, got.windows, got.window) == (wanted.tokens, wanted.windows, wanted.window)


def test_without_onnx_a_graph_is_read_token_by_token(tiny_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not open_graph(tiny_onnx, "cpu", all_logits=True).all_logits


def test_evaluation_scores_both_alike(tiny_onnx, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    report = evaluate_models(
        ["tiny", tiny_onnx], ["piqa"], data=tmp_path, text=heldout_path(), window=128, max_windows=3, device="cpu"
    )
    ours, theirs = report.models[1].scores, report.models[0].scores
    assert [score.metric for score in ours] == ["perplexity", "acc", "acc_norm"]
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.value == pytest.approx(wanted.value, rel=1e-5)
    assert abs(report.models[1].excess.nats) < 1e-5
    assert report.models[1].parameters == report.models[0].parameters


def test_tasks_generate_alike(tiny, tiny_onnx):
    pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")
    from types import SimpleNamespace

    from ssmc.runtime.evaluation.lm import RecurrentLM

    tokenizer = open_session("tiny", device="cpu").tokenizer
    options = {"until": [".", "\n\n"], "max_gen_toks": 25, "do_sample": False, "temperature": 0.0}
    requests = [SimpleNamespace(args=(prompt, options)) for prompt in PROMPTS]
    exported = load_onnx_export(tiny_onnx, "cpu", all_logits=True).model
    texts = [RecurrentLM(model, tokenizer).generate_until(requests) for model in (exported, use_fast_scan(tiny.model))]
    assert texts[0] == texts[1]
    assert all(text and "." not in text for text in texts[0])
    with pytest.raises(UsageError, match="num_beams"):
        RecurrentLM(exported, tokenizer).generate_until([SimpleNamespace(args=("x", {**options, "num_beams": 2}))])


# --- benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(artefact):
    return benchmark(
        artefact,
        lengths=[8, 16],
        batch_sizes=[1, 2],
        decode_tokens=2,
        repeats=2,
        time_budget=0.1,
        window=64,
        max_windows=2,
        device="cpu",
        stock=False,
    )


def test_a_benchmark_has_the_export_beside_the_models_in_torch(report, artefact):
    dense, ours, onnx = report.models
    assert [model.runtime for model in report.models] == ["torch", "torch", "onnx"]
    assert onnx.name == "ssmc-out/onnx"
    assert onnx.parameters == ours.parameters
    assert onnx.dimensions == ours.dimensions
    assert onnx.stored_dtype == "float32"
    assert onnx.files[0].bytes == sum(p.stat().st_size for p in artefact.glob("onnx/model.onnx*"))
    assert onnx.state_bytes == 4 * 6 * 512 * (8 + 3)  # float32, layers, d_inner, states and the convolution's window
    assert onnx.memory.state == 2 * onnx.state_bytes
    assert onnx.memory.peak >= onnx.memory.loaded > onnx.memory.libraries
    assert onnx.perplexity.nll_per_token == pytest.approx(ours.perplexity.nll_per_token, abs=1e-5)
    assert onnx.excess.nats == pytest.approx(ours.excess.nats, abs=1e-5)
    for kind in ("prefill", "decode"):
        assert all(set(m.timings) == set(report.names) for m in report.of_kind(kind))
    for kind in ("scan", "part"):
        assert all(set(m.timings) == {dense.name, ours.name} for m in report.of_kind(kind))
    assert "onnxruntime" in report.conditions.versions


def test_the_tables_and_the_page_hold_what_was_measured(report, tmp_path):
    rows = {row.metric: row for row in summary_rows(report)}
    assert rows["Scan alone, one layer, 16 tokens, batch 1"].values[2] == ""
    assert all(rows["Prefill, 16 tokens, batch 1"].values)
    assert all(len(row.values) == 3 and len(row.changes) == len(row.verdicts) == 2 for row in rows.values())
    sentences = [s for s in findings(report) if "ssmc-out/onnx" in s]
    assert any("Prefill" in s for s in sentences)
    assert not any("scan alone" in s for s in sentences)
    page = report.write(tmp_path)[1].read_text()
    assert page.count("ssmc-out/onnx") > 5
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [model["runtime"] for model in written["models"]] == ["torch", "torch", "onnx"]


def test_exports_as_the_only_models(tiny_onnx, tmp_path, monkeypatch):
    """The reference too may be an export: then nothing is timed but prefill and decode."""

    def fails(task):
        raise MemoryProcessError("it was too slow for a test")

    monkeypatch.setattr(sys.modules["ssmc.runtime.bench.run"], "measure_memory", fails)
    report = benchmark(
        dense=tiny_onnx,
        models=[tiny_onnx],
        lengths=[8],
        batch_sizes=[1],
        decode_tokens=2,
        repeats=2,
        time_budget=0.1,
        window=64,
        max_windows=2,
        device="cpu",
    )
    assert {m.kind for m in report.measurements} == {"prefill", "decode"}
    assert report.names == ("tiny-onnx", "tiny-onnx (2)")
    assert findings(report)
    report.write(tmp_path)


def test_the_runtimes_that_are_asked_for(artefact, capsys):
    names = {
        runtimes: [s.name for s in find_sources(artefact, runtimes=runtimes)[1:]]
        for runtimes in (("torch",), ("onnx",))
    }
    assert names == {("torch",): ["ssmc-out/safetensors"], ("onnx",): ["ssmc-out/onnx"]}
    assert len(find_sources(artefact)) == 3
    assert "abacus" in run(capsys, "bench", artefact, "--runtime", "torch,abacus").sentence(2)
    assert "abacus" in run(capsys, "eval", artefact, "--runtime", "abacus").sentence(2)


def test_an_export_that_cannot_be_run_is_left_out_where_others_are_left(artefact, tiny_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    left, notes = runnable(find_sources(artefact), torch.device("cpu"))
    assert [source.name for source in left] == ["tiny", "ssmc-out/safetensors"]
    assert "ssmc-out/onnx was left out" in notes[0]
    for only in (find_sources(artefact, runtimes=("onnx",)), find_sources("", "tiny", [tiny_onnx])):
        with pytest.raises(UsageError, match=r"ssmc\[onnx\]"):
            runnable(only, torch.device("cpu"))


def test_a_manifest_that_lacks_sizes(tiny_onnx, tmp_path):
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        (tmp_path / name).write_bytes((tiny_onnx / name).read_bytes())
    manifest = json.loads((tiny_onnx / "ssmc.json").read_text())
    del manifest["parameters"]
    (tmp_path / "ssmc.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="parameters"):
        load_onnx_export(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "ssmc.json").write_text((tiny_onnx / "ssmc.json").read_text())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_onnx_export(tmp_path)
