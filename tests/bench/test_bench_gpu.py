"""What the benchmark measures on a GPU, as far as a CPU can show it: that each part is the layer's, that a decoding
step can be recorded, how a sweep ends, and how the report shows it all. No test asserts how long anything takes.
"""

# ruff: noqa: RUF001 (typographic dashes and multiplication signs are what users see)

import dataclasses
import json

import pytest
import torch
from torch import nn

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.bench import benchmark, summary, throughput
from ssmc.runtime.bench.graphs import measure_graphs
from ssmc.runtime.bench.html import render
from ssmc.runtime.bench.parts import parts
from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.bench.throughput import is_out_of_memory, measure_throughput
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.conditions import Gpu
from ssmc.runtime.measure.sources import dtypes_note, find_sources, load_subjects
from ssmc.runtime.measure.timing import MIN_ROUNDS, Timing, paired_ratio
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, record, states_stay
from ssmc.runtime.sparse24 import ModuleReport, Sparse24Report
from tests.support.gpu import needs_cuda
from tests.support.models import random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench24") / "out"
    compress("tiny", out=out, pattern="2:4", ffn_score="magnitude")
    export(out, format="sparse24")
    return out


@pytest.fixture(scope="module")
def report(artefact):
    small = {"lengths": (8,), "batch_sizes": (1,), "decode_tokens": 2, "repeats": MIN_ROUNDS, "time_budget": 0.1}
    return benchmark(artefact, **small, window=64, max_windows=8, max_batch=4, device="cpu")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_parts_are_those_of_the_first_layer():
    """Against what stock transformers' own modules read and put out in a forward pass, seen through hooks."""
    model = random_model()
    mixer, seen = model.backbone.layers[0].mixer, {}

    def note(module, arguments, output):
        seen[next(name for name, child in mixer.named_children() if child is module)] = (arguments[0], output)

    for module in mixer.children():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    tokens = work.random_tokens(model, 2, 12)
    with torch.no_grad():
        model(tokens)
        stock = dict(seen)  # as it is now: the parts go through the same modules
        found = {name: run() for name, run in parts(model, architecture_for("mamba"), 2, 12, "auto").items()}
        low_rank = stock["x_proj"][1][..., : mixer.time_step_rank]
        wanted = {name: stock[name][1] for name in ("in_proj", "x_proj", "out_proj")}
        wanted |= {"conv1d": stock["x_proj"][0], "scan": stock["out_proj"][0]}
        wanted["dt_proj"] = low_rank @ mixer.dt_proj.weight.t()
        last = model.backbone.norm_f(model.backbone.embeddings(tokens[:, -1:]))
        wanted["head"] = model.lm_head(last)
    assert list(found) == ["in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj", "head"]
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [use_stock_scan, use_fast_scan])
def test_a_step_changes_its_states_in_place_so_that_a_graph_can_hold_it(use):
    step = work.decoding(use(random_model()), 3)
    assert len(step.states()) == 2 * 3  # a window and a state for each layer
    assert states_stay(step)


def test_states_that_move_are_noticed():
    step = work.decoding(random_model(), 2)
    run = step.run

    def moving():
        logits = run()
        layer = step.cache.layers[1]
        layer.recurrent_states[0] = layer.recurrent_states[0].clone()
        return logits

    with pytest.raises(NotRecordable, match="move in memory"):
        record(dataclasses.replace(step, run=moving), CPU)
    assert not states_stay(dataclasses.replace(step, run=lambda: None))  # a step that does nothing


def test_without_a_gpu_there_is_no_graph_and_nothing_is_said():
    with pytest.raises(NotRecordable, match="need a CUDA device"):
        record(work.decoding(random_model(), 2), CPU)
    assert measure_graphs([], Settings((8,), (1,), 4, 6, 0.0, 64, 2, "auto"), CPU) == ([], [])


@needs_cuda
@torch.inference_mode()
@pytest.mark.parametrize("use", [use_stock_scan, use_fast_scan])
def test_a_replayed_step_continues_the_sequences(use):
    model = use(random_model()).cuda()
    step = work.decoding(model, 2)
    replay = record(step, torch.device("cuda"))
    states = [state.clone() for state in step.states()]
    wanted = [step.run().clone() for _ in range(3)]
    for state, value in zip(step.states(), states, strict=True):
        state.copy_(value)
    for logits in wanted:
        torch.testing.assert_close(replay(), logits, rtol=1e-3, atol=1e-3)


# --- throughput -------------------------------------------------------------------------------------------------------


def test_the_sweep_goes_to_the_largest_batch(report):
    swept = report.of_kind("throughput")
    assert [m.batch for m in swept] == [1, 2, 4]
    names = [model.name for model in report.models]
    assert all(list(m.timings) == names and m.ratios == {} and m.length == 1 for m in swept)


def settings(**changes):
    return dataclasses.replace(Settings((8,), (1,), 4, 6, 0.0, 64, 2, "auto"), **changes)


def test_the_sweep_ends_where_memory_does(artefact, monkeypatch):
    """On a CPU a share of the free RAM is the limit; here it is none of it."""
    subjects = load_subjects(find_sources(artefact), torch.float32)
    monkeypatch.setattr(throughput, "PART_OF_RAM", 0.0)
    found, notes = measure_throughput(subjects, settings(max_batch=64), CPU)
    assert found == []
    assert notes[0].startswith("tiny decodes up to 0 sequences at once here; 1 do not fit")
    assert measure_throughput(subjects, settings(), CPU) == ([], [])


def test_a_real_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_sparse24_export_runs_dense_on_a_cpu_and_the_report_says_so(report):
    exported = report.compressed[0]
    assert exported.name.endswith("sparse24")
    assert report.dense.sparse24 is None
    assert exported.sparse24.kept == 0
    assert len(exported.sparse24.modules) == 6 * 4
    assert [n for n in report.notes if "2:4 modules run dense" in n] == [f"{exported.name}: {exported.sparse24.reason}"]
    entry = report.to_json()["models"][1]["sparse24"]
    assert entry["modules"][0]["shape"] == [1024, 256]
    assert entry["reason"] == exported.sparse24.reason
    assert summary.sparse24_rows(report) == []
    json.dumps(report.to_json())


def test_different_dtypes_are_told(artefact):
    subjects = load_subjects(find_sources(artefact), torch.float32)
    assert dtypes_note(subjects) == []
    subjects[1].checkpoint.model.bfloat16()
    (note,) = dtypes_note(subjects)
    assert "(tiny in float32, " in note
    assert "sparse24 in bfloat16)" in note


def on_a_gpu(report):
    """The report as a GPU would fill it in."""
    dense, exported = report.models
    timing, slower = Timing((2e-3,) * 8), Timing((1e-3,) * 8)
    rows = (
        ModuleReport(
            "backbone.layers.0.mixer.in_proj",
            (1024, 256),
            "cutlass",
            timing,
            slower,
            paired_ratio(timing, slower),
            True,
            "",
        ),
        ModuleReport(
            "backbone.layers.0.mixer.dt_proj", (512, 16), None, None, None, None, False, "no product of its own"
        ),
    )
    memory = dataclasses.replace(dense.memory, reserved=2**30, steady_reserved=2**29, sequence=2**20)
    gpu = Gpu("NVIDIA H100", 2**36, "9.0", "580.1", "13.0", 700.0, 1980.0, 1980.0, 2619.0, 120.5)
    models = (
        dataclasses.replace(dense, memory=memory),
        dataclasses.replace(exported, memory=memory, sparse24=Sparse24Report(1, 8, rows, None)),
    )
    sweep = [m for m in report.measurements if m.kind == "throughput"]
    last = dataclasses.replace(sweep[-1], batch=8, timings={dense.name: timing})
    graph = dataclasses.replace(report.of_kind("decode")[0], kind="graph")
    return dataclasses.replace(
        report,
        models=models,
        measurements=(*report.measurements, last, graph),
        conditions=dataclasses.replace(report.conditions, device="cuda", gpu=gpu),
    )


def test_a_report_of_a_gpu_has_a_row_per_module_and_says_what_does_not_fit(report):
    gpu = on_a_gpu(report)
    rows = summary.sparse24_rows(gpu)
    assert [row.metric for row in rows] == ["layers.0.mixer.in_proj", "layers.0.mixer.dt_proj"]
    assert rows[0].values == (
        "1024 x 256", "2.00 ms (2.00–2.00)", "1.00 ms (1.00–1.00)", "2.00× (2.00–2.00)", "sparse, cutlass",
    )  # fmt: skip
    assert rows[1].values[-1] == "dense: no product of its own"
    tokens = {row.metric: row.values for row in summary.token_rows(gpu)}
    assert tokens["Decode, each model alone, batch 8"] == ("4,000", "does not fit")
    assert "Decode with a CUDA graph, batch 1" in tokens
    metrics = [row.metric for row in (*summary.memory_rows(gpu), *summary.sequence_rows(gpu))]
    assert metrics == [
        "Peak while loading",
        "Reserved by the allocator",
        "Allocated between steps of decoding",
        "The same, reserved by the allocator",
        "Peak GPU memory",
        "Recurrent state of a sequence, in memory",
        "One more sequence, with activations",
        "Sequences that fit in GPU memory",
    ]
    page = render(gpu)
    for text in ("2:4 modules", "sparse, cutlass", "700 W", "2619.0 MHz", "does not fit", "From the allocator"):
        assert text in page
    assert json.loads(json.dumps(gpu.to_json()))["models"][1]["sparse24"]["kept"] == 1


def test_tokens_per_second_are_tokens_over_seconds(report):
    rows = summary.token_rows(report)
    assert [row.metric for row in rows] == [
        "Prefill, 8 tokens, batch 1",
        "Decode, batch 1",
        *(f"Decode, each model alone, batch {batch}" for batch in (1, 2, 4)),
    ]
    prefill = report.of_kind("prefill")[0].timings[report.dense.name]
    assert rows[0].values[0] == f"{8 / prefill.median:,.0f}"
