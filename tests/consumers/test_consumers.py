"""`make consumers`: a consumer is asked in a process of its own, what it computes is judged, and rows become tables.

Here the consumer is the onnxruntime of this environment, and the export a graph whose recurrence is written in numpy.
"""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.speed.consumers_report import markdown as markdown_of_speed
from benchmarks.speed.consumers_report import merged as merged_records
from benchmarks.speed.consumers_report import plot, show
from consumers.artefacts import LIMITED, LIMITED_AT_FIRST, UNLIMITED, reference
from consumers.asking import SCRIPTS, Consumer, ConsumerError
from consumers.by_hand.compare import main as compare
from consumers.environments import KINDS, REQUIREMENTS, pinned
from consumers.results import DIFFERS, FAILED, RAN, REFUSED, WRONG, Row, markdown, merged, read_rows, write_rows
from consumers.run import FIRST, LENGTHS, differences, explained, judge
from consumers.run import main as run
from ssmc.compressor import compress
from ssmc.exporters import export
from tests.support.families import FAMILIES, TINY_VOCAB, random_ids, with_tokenizer
from tests.support.graphs import V, naive_logits, save

PYTHON = Path(sys.executable)
SCRIPT = "ask_onnxruntime.py"


def row(**changes):
    content = {"consumer": "software", "page": "vllm", "model": "tiny", "cut": "dense", "format": "onnx"}
    content |= {"outcome": RAN, "date": "2026-11-01", "version": "1.2", "whole": 1e-6, "stepped": 3e-6}
    return Row(**(content | changes))


def test_a_consumer_tells_whole_prompts_and_single_tokens(tmp_path):
    save(tmp_path)
    tokens = np.random.default_rng(0).integers(0, V, (1, 12))
    wanted = naive_logits(tokens)[0]
    with Consumer(PYTHON, SCRIPT, tmp_path) as consumer:
        whole, stepped = consumer.logits(tokens[0].tolist(), (1, 5, 12), 7)
        times = consumer.time(tokens[0].tolist(), 4)
        assert consumer.values == "logits"
        assert consumer.versions["onnxruntime"]
    np.testing.assert_allclose(whole, wanted[[0, 4, 11]], atol=1e-5)
    np.testing.assert_allclose(stepped, wanted[7:], atol=1e-5)
    assert min(times["prefill"], times["decode"]) > 0


def test_what_does_not_load_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(ConsumerError, match=r"the export/model\.onnx") as refused:
        Consumer(PYTHON, SCRIPT, tmp_path)
    assert str(tmp_path) not in str(refused.value)


def test_a_consumer_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(ConsumerError, match=r"no answer within 0\.01 s"):
        Consumer(PYTHON, SCRIPT, tmp_path, limit=0.01)


def test_differences_are_of_the_right_tokens_and_kind():
    wanted = torch.randn(LENGTHS[-1], V, generator=torch.Generator().manual_seed(0))
    whole, stepped = wanted[[n - 1 for n in LENGTHS]].clone(), wanted[FIRST:].clone()
    assert differences((whole, stepped), wanted, "logits") == (0, 0)
    whole[1, 3] += 0.5
    stepped[2, 1] -= 0.25
    assert differences((whole, stepped), wanted, "logits") == pytest.approx((0.5, 0.25), abs=1e-6)
    stepped[0, 0] = float("nan")
    assert differences((whole, stepped), wanted, "logits")[1] == float("inf")
    logs = wanted.log_softmax(-1)
    found = logs[[n - 1 for n in LENGTHS]], logs[FIRST:]
    assert max(differences(found, wanted, "log probabilities")) < 1e-5
    assert min(differences(found, wanted, "logits")) > 1


def test_a_row_is_judged_by_the_model_and_by_what_else_is_done_about_time_steps():
    def judged(model, at_first=(9, 9), never=(9, 9)):
        return judge(row(), {LIMITED: model, LIMITED_AT_FIRST: at_first, UNLIMITED: never})

    assert judged((1e-5, 2e-5)).outcome == judge(row(), {LIMITED: (1e-5, 2e-5)}).outcome == RAN
    assert judge(row(), {LIMITED: (1e-5, 0.3)}).outcome == DIFFERS
    assert judged((1e-5, float("inf"))).outcome == DIFFERS
    explained = judged((0.2, 0.3), never=(1e-5, 2e-5))
    assert (explained.outcome, explained.whole, explained.stepped) == (RAN, 1e-5, 2e-5)
    assert explained.reason.startswith("whole prompts: does not limit")
    assert "moves a logit by 2e-01; token by token: does not limit" in explained.reason
    explained = judged((1e-5, 0.3), at_first=(1e-5, 2e-5))
    assert explained.reason.startswith("token by token: limits time steps as the model asks for in the prompt only")
    assert judged((0.1, 0.3), never=(0.2, 2e-5)).outcome == DIFFERS


def test_a_known_fault_of_a_consumer_is_told_from_one_of_ours(tmp_path):
    """Zamba2's prompts are wrong in one release of transformers; what differs in another is nobody's known fault."""
    FAMILIES["zamba2"]().save_pretrained(tmp_path)
    stock = next(kind for kind in KINDS if kind.name == "transformers-4.57")
    differs = row(model="zamba2, random", outcome=DIFFERS, whole=1.5, reason="whole prompts 1.5e+00")
    found = explained(replace(differs, version="4.57.6"), stock, str(tmp_path))
    assert (found.outcome, found.whole) == (WRONG, 1.5)
    assert found.reason.startswith("whole prompts 1.5e+00: its release 4.57, without mamba_ssm's kernels, is wrong")
    newer = replace(differs, version="5.24.0")
    assert explained(newer, stock, str(tmp_path)) == newer


def test_a_release_without_a_family_is_said_to_have_none(tmp_path):
    FAMILIES["nemotron_h"]().save_pretrained(tmp_path)
    stock = next(kind for kind in KINDS if kind.name == "transformers-4.57")
    assert pinned(stock).startswith("4.57.")
    failed = row(outcome=FAILED, reason="ValueError: ...", version=pinned(stock))
    assert explained(failed, stock, str(tmp_path)).reason.startswith("its release 4.57 has no models of this family")
    for other in (replace(failed, version="5.24.0"), replace(failed, outcome=RAN)):
        assert explained(other, stock, str(tmp_path)) == other


def test_keys_and_values_grow_where_a_graph_has_attention(tmp_path):
    FAMILIES["bamba"](vocab_size=TINY_VOCAB).save_pretrained(tmp_path / "model")
    with_tokenizer(tmp_path / "model")
    export(tmp_path / "model", format="onnx", out=tmp_path / "graph")
    tokens = random_ids(1, 12)[0].tolist()
    wanted = reference(tmp_path / "model", tokens, 7)[LIMITED]
    with Consumer(PYTHON, SCRIPT, tmp_path / "graph") as consumer:
        whole, stepped = consumer.logits(tokens, (1, 12), 7)
    np.testing.assert_allclose(whole, wanted[[0, 11]], atol=1e-4)
    np.testing.assert_allclose(stepped, wanted[7:], atol=1e-4)


def test_what_was_told_by_hand_becomes_a_row(tmp_path):
    """Of each token the likeliest log probabilities only, and those behind the prompt are of single tokens."""
    model = FAMILIES["bamba"]()
    model.save_pretrained(tmp_path / "model")
    tokens = random_ids(1, 9)
    with torch.inference_mode():
        logs = model(tokens).logits[0, :-1].double().log_softmax(-1)
    told, ids = logs.topk(5)
    told[6, 2] += 0.25  # what follows the seventh token, the second behind the prompt
    parts = {"ids": ids.numpy(), "told": told.numpy(), "version": "1.2", "device": "CPU"}
    np.savez(tmp_path / "told.npz", tokens=tokens[0].numpy(), prompt=6, **parts)
    path = tmp_path / "rows.json"
    compare([str(tmp_path / "told.npz"), str(tmp_path / "model"), "--model", "bamba", "--json", str(path)])
    (found,) = read_rows(path)
    assert (found.consumer, found.version, found.outcome) == ("vLLM, CPU", "1.2", DIFFERS)
    assert found.whole < 1e-5
    assert found.stepped == pytest.approx(0.25, abs=1e-5)


def test_what_did_not_run_by_hand_becomes_a_row_with_the_reason(tmp_path):
    np.savez(tmp_path / "told.npz", error="RuntimeError: no\n kernel", version="1.2", device="CPU")
    path = tmp_path / "rows.json"
    compare([str(tmp_path / "told.npz"), "nowhere", "--model", "bamba", "--json", str(path)])
    (found,) = read_rows(path)
    assert (found.version, found.outcome, found.reason) == ("1.2", FAILED, "RuntimeError: no kernel")


def test_what_else_is_done_about_time_steps_is_what_stock_transformers_does(tmp_path):
    """Its recurrent step knows no limits, whatever its prefill did."""
    model = FAMILIES["nemotron_h"](time_step_min=0.3)
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(1, LENGTHS[-1])
    found = reference(tmp_path / "model", ids[0].tolist(), FIRST)
    assert float((found[LIMITED] - found[UNLIMITED]).abs().max()) > 0.1
    with torch.inference_mode():
        prompt = model(ids[:, :FIRST], use_cache=True)
        rows = [prompt.logits[0]]
        for place in range(FIRST, ids.shape[1]):
            step = model(ids[:, place : place + 1], past_key_values=prompt.past_key_values, use_cache=True)
            rows.append(step.logits[0])
        torch.testing.assert_close(found[LIMITED_AT_FIRST], torch.cat(rows).double(), atol=1e-4, rtol=1e-4)
        without = FAMILIES["nemotron_h"](time_step_min=1e-9)
        torch.testing.assert_close(found[UNLIMITED], without(ids).logits[0].double(), atol=1e-4, rtol=1e-4)


def test_a_masked_model_without_gated_norms_needs_no_other_epsilon(tmp_path):
    """A Falcon-H1 may have none; its mixers then have another module in their place."""
    model = FAMILIES["falcon_h1"]()
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 5)
    found = reference(tmp_path, ids[0].tolist(), 2, shrunk=tmp_path)
    torch.testing.assert_close(found[LIMITED], model(ids).logits[0].detach().double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "pattern"), [("falcon_h1", "width"), ("bamba", "head+width")])
def test_norms_over_fewer_numbers_have_another_epsilon_in_the_reference(family, pattern, tmp_path):
    """In double precision the masked model then is the export, and not nearly so."""
    changes = {"mamba_n_groups": 1} if family == "bamba" else {}
    FAMILIES[family](vocab_size=TINY_VOCAB, **changes).save_pretrained(tmp_path / "model")
    with_tokenizer(tmp_path / "model")
    masked = tmp_path / "out"
    compress(tmp_path / "model", out=masked, pattern=pattern, sparsity=0.5, score="magnitude", repair=False)
    shrunk = export(masked).directory
    ids = random_ids(1, 40)
    cut = AutoModelForCausalLM.from_pretrained(shrunk, dtype=torch.float64)(ids).logits[0]
    same, plain = (reference(masked, ids[0].tolist(), 9, shrunk=of)[LIMITED] for of in (shrunk, None))
    near, far = (float((found - cut).abs().max()) for found in (same, plain))
    assert near < 1e-5
    assert near < far / 10


def test_rows_that_were_run_again_replace_the_old_ones(tmp_path):
    path = tmp_path / "rows.json"
    old, other = row(date="2026-01-01"), row(model="jamba")
    write_rows([old, other], path)
    new = row(date="2026-02-02")
    assert merged(read_rows(path), [new]) == [new, other]


def test_rows_of_another_machine_are_taken_into_the_table(tmp_path):
    here, elsewhere = tmp_path / "here.json", tmp_path / "elsewhere.json"
    kept, old, new = row(), row(consumer="mamba_ssm, GPU", outcome=FAILED), row(consumer="mamba_ssm, GPU")
    write_rows([kept, old], here)
    write_rows([new], elsewhere)
    assert run(["--take", str(elsewhere), "--json", str(here)]) == 0
    assert read_rows(here) == [kept, new]
    assert "by source; by hand: consumers/run.py" in markdown([kept])
    assert "by source; by hand: consumers/run.py" not in markdown([kept, new])


def test_a_consumer_without_metadata_tells_its_version(tmp_path, monkeypatch):
    """What was built by hand is a folder on the path."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "built_by_hand.py").write_text('__version__ = "2.3"\n')
    worker = import_module("worker")
    assert worker.version_of("built-by-hand") == "2.3"
    assert worker.version_of("numpy") == np.__version__


def test_the_table_says_what_ran_when_and_why_not():
    rows = [row(), row(model="jamba", outcome=REFUSED, reason="no graph", whole=None, stepped=None)]
    rows.append(row(consumer="another", outcome=FAILED, reason="no kernel", whole=None, stepped=None, version=""))
    rows.append(row(model="zamba2", outcome=DIFFERS, whole=0.3, stepped=0.2, reason="whole prompts 3e-01"))
    text = markdown(rows)
    assert "| [software](vllm.md) | 1.2 | ran, 2026-11-01 | 1 of 3 | 3.0e-06 |" in text
    assert "| [another](vllm.md) |  | did not run, 2026-11-01 | 0 of 1 |  |" in text
    assert "| tiny | dense | 3e-06 | no |" in text
    assert "| zamba2 | dense | **differs**, 3e-01 |  |" in text
    rows.append(row(cut="half", whole=2e-6))
    assert "| tiny | dense | 3e-06 | no |\n| tiny | half | 3e-06 |  |\n| jamba" in markdown(rows)
    assert "| software | jamba (dense) | no graph |" in text
    assert "by source" in text


def record(**changes):
    """As `benchmarks.speed.consumers` writes it: the second model prefills twice as fast, decode may be no faster."""
    times = {"median_s": 0.4, "quartiles_s": [0.3, 0.5], "samples_s": [0.3, 0.4, 0.5]}
    ratios = {"dense": (1.0, 1.0, 1.0), "column 0.5": (2.0, 1.9, 2.1)}
    rows = []
    for kept, (median, low, high) in ratios.items():
        faster = {"median": median, "low": low, "high": high, "rounds": 3}
        decode = times | {"times_faster_than_dense": faster | {"low": 0.9}}
        prefill = times | {"times_faster_than_dense": faster}
        rows.append(
            {"kept": kept, "loss": {"nats": 0.0 if kept == "dense" else 0.0123}, "prefill": prefill, "decode": decode}
        )
    return {"model": "tiny", "runtime": "software", "rows": rows, "missing": {}} | changes


def test_figures_of_speed_become_one_table_and_one_plot(tmp_path):
    old, other = record(rows=[]), record(runtime="another", missing={"column 0.5": "no kernel"})
    records = merged_records([old, other], [record()])
    assert [item["runtime"] for item in records] == ["software", "another"]
    heading, _, dense, pruned = markdown_of_speed(records).splitlines()
    assert heading == "| model | removed | software | another | loss |"
    assert dense == "| tiny | dense | 400 ms / 400 ms | 400 ms / 400 ms |  |"
    assert pruned == "| tiny | column 0.5 | 2.00 / (2.00) | 2.00 / (2.00) | +0.0123 |"
    plot([*records, record(model="tiny-mamba2")], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<!-- column 0.5 -->") == 2
    assert "prefill, times as fast as dense" in text
    show(records)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_consumer_has_exact_versions_a_script_and_a_page(kind):
    root = REQUIREMENTS.parents[1]
    assert (root / "consumers" / "ask" / kind.script).is_file()
    assert (root / "docs" / "deploy" / f"{kind.page}.md").is_file()
    if kind.by_hand:  # by the Python that runs this
        return
    lines = (REQUIREMENTS / f"{kind.name}.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert any(line.startswith(f"{kind.package}==") for line in lines)
