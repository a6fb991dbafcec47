"""Benchmarks, evaluation and generation of a GGUF export, beside torch's models."""

import pytest
import torch

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.bench import benchmark
from ssmc.runtime.bench.html import render
from ssmc.runtime.errors import UsageError
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.measure.sources import find_sources, runnable
from ssmc.runtime.measure.timing import Elapsed, clock
from ssmc.runtime.models.generation import generate, open_session
from ssmc.runtime.models.llama_cpp import is_installed

pytestmark = pytest.mark.skipif(not is_installed(), reason="llama.cpp (xllamacpp) is not installed")
QUICK = {"lengths": (16,), "batch_sizes": (1, 2), "decode_tokens": 2, "repeats": 1, "time_budget": 0.1, "window": 32}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, sparsity=0.5, score="magnitude", repair=False)
    export(out)
    export(out, format="gguf")
    return out


def test_bench_times_and_scores_it_beside_the_others(artefact, text):
    report = benchmark(artefact, text=text, max_windows=2, stock=False, **QUICK)
    dense, torchs, llamas = report.models
    assert [model.runtime for model in report.models] == ["torch", "torch", "llama.cpp"]
    assert llamas.perplexity.ppl == pytest.approx(torchs.perplexity.ppl, rel=1e-5)
    assert llamas.excess.nats == pytest.approx(torchs.excess.nats, abs=1e-5)
    assert llamas.parameters == torchs.parameters < dense.parameters
    assert 0 < llamas.memory.libraries < llamas.memory.loaded <= llamas.memory.peak
    assert "xllamacpp" in report.conditions.versions
    timed = {(m.kind, m.batch): set(m.timings) for m in report.measurements}
    assert llamas.name in timed["prefill", 1] & timed["decode", 1]
    assert llamas.name not in timed["decode", 2] | timed["scan", 1]  # one sequence, and no parts
    assert render(report).count("gguf") > 1


def test_evaluation_scores_it(artefact, text):
    report = evaluate_models([artefact], text=text, window=32, max_windows=2, recall=True)
    _, torchs, llamas = report.models
    assert llamas.perplexity.ppl == pytest.approx(torchs.perplexity.ppl, rel=1e-5)
    assert llamas.recall is not None


def test_it_generates_what_torch_generates(artefact):
    texts = [generate(artefact / name, "Once upon a time", max_new_tokens=12) for name in ("safetensors", "gguf")]
    assert "".join(texts[0]) == "".join(texts[1])
    session = open_session(artefact / "gguf").session
    session.prefill([[5, 8, 13]])
    more = session.step([21])
    session.reset()
    torch.testing.assert_close(more, session.prefill([[5, 8, 13, 21]]), rtol=0, atol=1e-4)
    with pytest.raises(UsageError):
        session.prefill([[1], [2]])


def test_it_is_left_out_where_it_cannot_run(artefact):
    left, notes = runnable(find_sources(artefact), torch.device("cuda"))
    assert [source.name.rpartition("/")[2] for source in left] == ["tiny", "safetensors"]
    assert "gguf was left out: GGUF files are run on the CPU" in notes[0]


def test_what_was_called_may_tell_its_own_time():
    assert clock(lambda: Elapsed(2.5), torch.device("cpu"), calls=3) == 2.5
    assert clock(lambda: 2.5, torch.device("cpu"), calls=3) < 1
