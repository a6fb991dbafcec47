"""The benchmark: fair timing, exact sizes against independent counts, a report that is complete and self-contained.

No test asserts how long anything takes, only that it was measured.
"""

# ruff: noqa: RUF001 (typographic dashes and multiplication signs are what users see)

import dataclasses
import getpass
import json
import math
import platform
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from ssmc.runtime.bench import benchmark, check_output, findings, summary_rows
from ssmc.runtime.bench.html import render
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.bench.speed import measure_speed
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError
from ssmc.runtime.measure.conditions import conditions as read_conditions
from ssmc.runtime.measure.memory import MemoryProcessError, MemoryTask, measure_memory
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.measure.quality import read_tokens
from ssmc.runtime.measure.sources import find_sources, label, load_subjects
from ssmc.runtime.measure.timing import MIN_ROUNDS, Timing, paired_ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from tests.support.benches import CPU, Page, save
from tests.support.models import write_manifest

# --- which models ---------------------------------------------------------------------------------------------------


def test_sources_of_an_artefact(artefact, monkeypatch):
    sources = find_sources(artefact)
    assert [s.name for s in sources] == ["dense", "ssmc-out/safetensors", "ssmc-out/mamba-ssm"]
    assert [s.dense for s in sources] == [True, False, False]
    assert sources[1].recipe == {"pattern": "column", "sparsity": 0.6}
    monkeypatch.chdir(artefact.parent)
    assert [s.name for s in find_sources("ssmc-out")][1] == "ssmc-out/safetensors"
    assert [s.name for s in find_sources("ssmc-out/mamba-ssm")] == ["dense", "ssmc-out/mamba-ssm"]
    assert find_sources("ssmc-out", dense="tiny")[0].where == "tiny"
    explicit = find_sources("ssmc-out", models=["tiny", "dense", artefact / "safetensors", "tiny"])
    assert [s.name for s in explicit] == ["tiny", "dense", "safetensors", "tiny (2)"]
    assert [s.dense for s in explicit] == [True, False, False, False]


def test_names_never_are_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert label("state-spaces/mamba-130m-hf") == "state-spaces/mamba-130m-hf"
    assert label(tmp_path / "model") == "model"
    assert label("~/model") == "model"
    assert label(".") == tmp_path.name
    assert label("../model") == "model"


def test_same_tensors_in_two_formats_are_one_subject(artefact, tmp_path):
    dense, compressed = load_subjects(find_sources(artefact), torch.float32)
    assert dense.twins == ()
    assert [source.name for source, _ in compressed.twins] == ["ssmc-out/mamba-ssm"]
    other = tmp_path / "other"
    tensors = compressed.checkpoint.tensors()
    tensors["backbone.layers.1.mixer.D"] = tensors["backbone.layers.1.mixer.D"] + 1
    save(other, tensors, compressed.checkpoint.config)
    assert len(load_subjects(find_sources(artefact, models=["tiny", artefact / "safetensors", other]), None)) == 3


def test_no_export_is_told(tmp_path):
    with pytest.raises(UsageError, match="ssmc compress"):
        benchmark(tmp_path)
    write_manifest(tmp_path, {"kind": "masked", "source": {"model": "tiny"}})
    with pytest.raises(UsageError, match="Run `ssmc export` first"):
        benchmark(tmp_path)
    with pytest.raises(UsageError, match="no model"):
        benchmark(tmp_path, models=[])


def test_a_missing_dense_model_is_told(artefact, tmp_path):
    export = tmp_path / "export"
    compressed = load_checkpoint(artefact / "safetensors")
    save(export, compressed.tensors(), compressed.config)
    write_manifest(export, {"kind": "export", "source": {"model": "gone", "relative": "../gone"}})
    with pytest.raises(CheckpointError, match=r"dense model.*--dense"):
        benchmark(export)
    write_manifest(export, {"kind": "export", "source": {}})
    with pytest.raises(CheckpointError, match=r"does not say which.*--dense"):
        benchmark(export)
    assert find_sources(export, dense="tiny")[0].where == "tiny"


def test_models_of_different_vocabularies_are_refused(artefact, tmp_path):
    torch.manual_seed(0)
    other = MambaForCausalLM(
        MambaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"different vocabularies \(.*4096.*67"):
        benchmark(models=[artefact / "safetensors", tmp_path / "other"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lengths": ()}, "lengths must be at least 1, not empty"),
        ({"lengths": (8, 0)}, "lengths must be at least 1, not 8, 0"),
        ({"batch_sizes": (-1,)}, "batch_sizes must"),
        ({"decode_tokens": 0}, "decode_tokens must"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"max_windows": 0}, "max_windows must"),
        ({"window": 1}, "window must be at least 2"),
        ({"max_batch": -1}, "max_batch must be at least 0"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"backend": "nonsense"}, "no scan backend 'nonsense'"),
        pytest.param(
            {"device": "cuda"},
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_senseless_options(artefact, option, message):
    with pytest.raises(UsageError, match=message):
        benchmark(artefact, **option)


# --- memory ---------------------------------------------------------------------------------------------------------


def memory_task(source) -> MemoryTask:
    return MemoryTask(str(source), "cpu", "float32", length=8, prefill_batch=1, decode_batch=1, backend="auto")


def test_a_memory_process_that_fails_says_why(tmp_path):
    with pytest.raises(MemoryProcessError, match="nowhere"):
        measure_memory(memory_task(tmp_path / "nowhere"))


# --- the report -----------------------------------------------------------------------------------------------------


def test_sizes_are_exact(report, artefact):
    folders = (artefact.parent / "dense", artefact / "safetensors")
    assert len(report.models) == 2
    for model, folder in zip(report.models, folders, strict=True):
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert model.parameters == sum(p.numel() for p in stock.parameters())  # tied head once
        assert model.files[0].bytes == (folder / "model.safetensors").stat().st_size
        assert model.dimensions.d_state == stock.config.state_size
        cache = stock(torch.zeros(1, 1, dtype=torch.long), use_cache=True).cache_params
        states = [s for layer in cache.layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        assert model.state_bytes == sum(s.numel() * 4 for s in states)
        assert model.stored_dtype == "float32"
    assert [file.name for file in report.compressed[0].files] == ["ssmc-out/safetensors", "ssmc-out/mamba-ssm"]
    weights = [f for f in (artefact / "mamba-ssm").iterdir() if f.suffix in (".bin", ".safetensors")]
    assert report.compressed[0].files[1].bytes == sum(f.stat().st_size for f in weights)


def test_perplexity_is_that_of_the_stock_models(report, artefact):
    dense, compressed = report.models
    tokenizer = load_tokenizer(load_checkpoint(artefact.parent / "dense"))
    stream = tokenize(read_texts(heldout_path()), tokenizer)
    assert report.text.tokens == len(stream)
    assert report.text.embedded
    losses = []
    for model, folder in ((dense, artefact.parent / "dense"), (compressed, artefact / "safetensors")):
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = perplexity(stock, stream[: 9 * 64], 64)
        assert (model.perplexity.windows, model.perplexity.window, model.perplexity.tokens) == (9, 64, 9 * 63)
        assert model.perplexity.nll_per_token == pytest.approx(expected.nll_per_token, abs=1e-5)
        losses.append(np.array(expected.window_nll))
    difference = losses[1] - losses[0]
    assert dense.excess is None
    assert compressed.excess.nats == pytest.approx(difference.mean(), abs=1e-5)
    assert compressed.excess.stderr == pytest.approx(difference.std(ddof=1) / 3, abs=1e-5)


def test_every_workload_is_measured(report):
    cells = [(m.kind, m.length, m.batch) for m in report.measurements]
    assert cells == [
        ("prefill", 8, 1),
        ("prefill", 16, 1),
        ("prefill", 8, 3),
        ("decode", 1, 1),
        ("decode", 1, 3),
        ("scan", 8, 1),
        ("scan", 16, 1),
        ("stock", 8, 1),
        *[("part", 16, 1)] * 7,
    ]
    parts = [m.part for m in report.of_kind("part")]
    assert parts == ["in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj", "head"]
    names = [model.name for model in report.models]
    for measurement in report.measurements:
        stock = measurement.kind == "stock"
        assert list(measurement.timings) == (["transformers' own loop", "ssmc scan"] if stock else names)
        assert list(measurement.ratios) == list(measurement.timings)[1:]
        for timing in measurement.timings.values():
            assert len(timing.seconds) == MIN_ROUNDS
            assert min(timing.seconds) > 0
            low, high = timing.quartiles
            assert min(timing.seconds) <= low <= timing.median <= high <= max(timing.seconds)
        first, second = measurement.timings.values()
        (ratio,) = measurement.ratios.values()
        pairs = [a / b for a, b in zip(first.seconds, second.seconds, strict=True)]
        assert (ratio.low, ratio.median, ratio.high) == (min(pairs), float(np.median(pairs)), max(pairs))


def test_memory_is_measured_in_processes_of_their_own(report):
    for model in report.models:
        assert 2**26 < model.memory.libraries <= model.memory.loaded <= model.memory.peak
        assert model.memory.above_libraries >= 4 * model.parameters  # float32 weights at the least
        assert model.memory.reserved is model.memory.steady_reserved is None
        assert model.memory.libraries < model.memory.steady <= model.memory.peak
        assert model.memory.state == model.memory.sequence == model.state_bytes  # in float32
        assert model.memory.weights == 4 * model.parameters
        assert model.memory.sequences == (model.memory.capacity - model.memory.weights) // model.state_bytes > 100


def test_conditions_describe_the_machine_but_not_whose_it_is(report, artefact):
    conditions = report.conditions
    assert conditions.versions["torch"] == torch.__version__
    before = torch.get_num_threads()
    assert read_conditions(CPU, torch.float32, None).torch_threads == before == torch.get_num_threads()
    assert conditions.memory_bytes > 2**28
    assert conditions.cpu
    assert (conditions.device, conditions.dtype, conditions.gpu) == ("cpu", "float32", None)
    text = json.dumps(report.to_json())
    assert platform.node() not in text.split('"')
    assert getpass.getuser() not in re.split(r'[":/ ]', text)
    assert str(artefact.parent) not in text


def test_json_holds_everything(report, artefact):
    check_output(artefact)
    written = report.write(artefact)
    assert [path.name for path in written] == ["bench.json", "bench.html"]
    data = json.loads((artefact / "bench.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert list(data) == ["schema", "conditions", "settings", "text", "models", "measurements", "notes"]
    assert data["schema"] == "ssmc-bench/1"
    assert data["settings"]["lengths"] == [8, 16]
    for model, entry in zip(report.models, data["models"], strict=True):
        assert set(entry) == {field.name for field in dataclasses.fields(model)}
        assert entry["dimensions"]["d_state"] == model.dimensions.d_state
        assert entry["perplexity"]["ppl"] == pytest.approx(math.exp(entry["perplexity"]["nll_per_token"]))
        assert len(entry["perplexity"]["window_nll"]) == 9
    for measurement, entry in zip(report.measurements, data["measurements"], strict=True):
        for name, timing in entry["timings"].items():
            assert timing["samples"] == list(measurement.timings[name].seconds)
            assert timing["tokens_per_second"] == pytest.approx(entry["length"] * entry["batch"] / timing["median"])
        for ratio in entry["ratios"].values():
            assert ratio["verdict"] in ("faster", "slower", "no difference")
    assert any("fair text only for the embedded model" in note for note in data["notes"])


def test_the_summary_says_what_does_not_help(report):
    rows = {row.metric: row for row in summary_rows(report)}
    assert rows["d_state"].values == ("8", "3")
    assert rows["d_state"].changes == ("2.67×",)
    assert rows["Recurrent state per sequence"].verdicts == ("better",)
    fewer = 1 - report.models[1].parameters / report.models[0].parameters
    assert f"{fewer:.1%} fewer parameters" in findings(report)[1]

    def with_decode(seconds):
        """The report as if decoding had taken the compressed model these seconds and the dense one 1."""
        names = [model.name for model in report.models]
        timings = {names[0]: Timing((1.0,) * len(seconds)), names[1]: Timing(seconds)}
        ratios = {names[1]: paired_ratio(*timings.values())}
        measurements = [
            dataclasses.replace(m, timings=timings, ratios=ratios) if m.kind == "decode" else m
            for m in report.measurements
        ]
        changed = dataclasses.replace(report, measurements=tuple(measurements))
        row = next(row for row in summary_rows(changed) if row.metric == "Decode, batch 1")
        return row.verdicts, next(sentence for sentence in findings(changed) if sentence.startswith("Decode, batch 1"))

    assert with_decode((0.5,) * 6) == (
        ("better",),
        "Decode, batch 1: 2.00× (2.00–2.00) the dense model's speed, faster.",
    )
    assert with_decode((2.0,) * 6)[0] == ("worse",)
    assert with_decode((2.0,) * 6)[1].endswith("slower.")
    assert with_decode((0.5,) * 2) == (
        ("",),
        "Decode, batch 1: 2.00× (2.00–2.00) the dense model's speed, but fewer than 6 rounds cannot tell.",
    )
    verdicts, sentence = with_decode((0.9, 0.9, 0.9, 0.9, 0.9, 1.1))
    assert verdicts == ("same",)
    assert sentence.endswith("no difference beyond the noise of this run.")


def test_nothing_of_the_users_is_overwritten(report, tmp_path):
    with pytest.raises(OutputError, match="not a folder"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "bench.html").write_text("<html>my own page</html>", encoding="utf-8")
    with pytest.raises(OutputError, match=r"bench\.html was not written by ssmc bench"):
        report.write(tmp_path)
    assert not (tmp_path / "bench.json").exists()
    (tmp_path / "bench.html").unlink()
    report.write(tmp_path)
    first = (tmp_path / "bench.html").read_bytes()
    report.write(tmp_path)  # ours may be replaced, and the same report gives the same bytes
    assert (tmp_path / "bench.html").read_bytes() == first


def test_one_model_alone_needs_no_tokenizer(artefact):
    """Perplexity is left out with a note, unless the user named the text; there is nothing to compare with."""
    settings = Settings((8,), (1,), 4, MIN_ROUNDS, 0.0, 64, 2, "auto")
    bare = load_subjects(find_sources(artefact, models=[artefact / "safetensors"]), None)
    checkpoints = [subject.checkpoint for subject in bare]
    tokens, info, notes = read_tokens(checkpoints, None, None, (64, 2))
    assert (tokens, info) == (None, None)
    assert notes[0].startswith("Perplexity was not measured")
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        read_tokens(checkpoints, heldout_path(), None, (64, 2))
    assert read_tokens(checkpoints, None, "tiny", (64, 2))[0].shape == (2 * 64,)
    measurements = measure_speed(bare, settings, CPU, stock=False)
    assert [(m.kind, m.ratios) for m in measurements] == [("prefill", {}), ("decode", {}), ("scan", {})]


def test_a_report_of_one_model_has_no_comparison(report):
    single = dataclasses.replace(
        report,
        models=report.models[:1],
        measurements=tuple(dataclasses.replace(m, ratios={}) for m in report.measurements if m.kind != "stock"),
    )
    assert findings(single) == []
    assert {len(row.changes) for row in summary_rows(single)} == {0}
    assert Page(render(single)).tags.count("svg") == 2


def test_progress_counts_models(artefact):
    calls = []
    load_subjects(find_sources(artefact), torch.float32, lambda *call: calls.append(call))
    assert [(done, total) for _, done, total in calls] == [(0, 3), (1, 3), (2, 3)]
