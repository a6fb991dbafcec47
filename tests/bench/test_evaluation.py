"""Tasks and their statistics against stock transformers, one text at a time, and sums done by hand."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssmc.runtime.errors import CalibrationError, CheckpointError, OutputError
from ssmc.runtime.evaluation import EvalReport, check_output, evaluate_models
from ssmc.runtime.evaluation.models import choose_sources
from ssmc.runtime.evaluation.scoring import run_tasks
from ssmc.runtime.evaluation.statistics import exp_mean, paired_difference, standard_error
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.tasks import HERE, SIX

pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")

import datasets
import lm_eval.api.task

from ssmc.runtime.evaluation.lm import RecurrentLM
from ssmc.runtime.evaluation.tasks import load_tasks, quiet

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def report(data, changed):
    return evaluate_models(["tiny", changed], list(HERE), data=data, window=256, max_windows=6, device="cpu")


@torch.no_grad()
def stock_score(model, tokenizer, context, continuation):
    """Log-probability of a continuation, and whether it is the greedy one: one text, no batch, no padding."""
    before = tokenizer.encode(context) if context else [0]
    both = tokenizer.encode(context + continuation) if context else [0, *tokenizer.encode(continuation)]
    logits = model(torch.tensor([both])).logits[0].double()
    wanted = both[len(before) :]
    rows = logits[len(before) - 1 : len(both) - 1].log_softmax(-1)
    return (
        sum(float(row[token]) for row, token in zip(rows, wanted, strict=True)),
        [int(row.argmax()) for row in rows] == wanted,
    )


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


TEXTS = [
    ("The girl", " was happy."),
    ("", "Once upon a time"),
    (" ".join(["In a small village there lived a robot who liked to read."] * 9), " The robot"),
    ("He opened the door and", " a"),
    ("They played together all day. At night they looked at the stars and", " made a wish."),
    ("Once upon a", " time"),
    ("A space is moved ", "over"),
    ("x", "y"),
    ("It was a very long and dark", " night, and the moon was the only light that anybody could see."),
    ("She said", " no"),
]


# --- log-likelihoods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_loglikelihood_is_that_of_stock_transformers_one_by_one(tiny, tokenizer, batch_size):
    found = RecurrentLM(tiny.model, tokenizer, batch_size).loglikelihood(requests(*TEXTS))
    for (value, greedy), (context, continuation) in zip(found, TEXTS, strict=True):
        spaces = context[len(context.rstrip()) :]  # lm-eval gives them to the continuation
        expected = stock_score(tiny.model, tokenizer, context.rstrip(), spaces + continuation)
        assert value == pytest.approx(expected[0], abs=2e-4)
        assert greedy == expected[1]
    assert {greedy for _, greedy in found} == {True, False}


def test_the_rolling_loglikelihood_of_a_text_is_its_tokens_sum(tiny, tokenizer):
    story = " ".join(context for context, _ in TEXTS if context)
    ((found, short),) = [RecurrentLM(tiny.model, tokenizer, 4).loglikelihood_rolling(requests((story,), ("A dog",)))]
    assert found == pytest.approx(stock_score(tiny.model, tokenizer, "", story)[0], rel=1e-5)
    assert short == pytest.approx(stock_score(tiny.model, tokenizer, "", "A dog")[0], rel=1e-5)


def test_the_rolling_loglikelihood_of_a_long_text_is_cut_into_windows(tiny, tokenizer, monkeypatch):
    """The first window starts with the end-of-text token, the others with the token before them; the last one, which is
    short, gets a full context."""
    monkeypatch.setattr(RecurrentLM, "max_length", 16)
    story = (
        "The old man told the children a story. They sat down to hear the story. It was long, and it was dark outside."
    )
    tokens = [0, *tokenizer.encode(story)]
    full, rest = divmod(len(tokens) - 1, 16)
    assert full >= 1
    assert rest > 0
    expected = 0.0
    with torch.no_grad():
        for start, scored in [*((16 * i, 16) for i in range(full)), (len(tokens) - 17, rest)]:
            window = torch.tensor([tokens[start : start + 17]])
            rows = tiny.model(window[:, :-1]).logits[0].log_softmax(-1)
            expected += float(rows.gather(1, window[0, 1:, None])[-scored:].double().sum())
    (found,) = RecurrentLM(tiny.model, tokenizer, 2).loglikelihood_rolling(requests((story,)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation_is_greedy_and_ends_at_a_stop_sequence(tiny, tokenizer):
    prompt = "Once upon a time"
    tokens = tokenizer.encode(prompt)
    with torch.no_grad():
        for _ in range(24):
            tokens.append(int(tiny.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    text = tokenizer.decode(tokens)[len(prompt) :]
    stop = text.split()[8]  # some word of what must come
    lm = RecurrentLM(tiny.model, tokenizer)
    found = lm.generate_until(requests((prompt, {"max_gen_toks": 24}), (prompt, {"until": [stop], "max_gen_toks": 24})))
    assert found == [text, text.split(stop)[0]]


def test_a_text_without_tokens_is_refused(tiny, tokenizer):
    with pytest.raises(CalibrationError, match="a text without tokens"):
        RecurrentLM(tiny.model, tokenizer).loglikelihood(requests(("A story", "")))


def test_a_broken_model_is_refused(tiny, tokenizer):
    broken = load_checkpoint("tiny", dtype=torch.float32).model
    broken.backbone.norm_f.weight.data[:] = math.nan
    with pytest.raises(CheckpointError, match="not a finite number"):
        RecurrentLM(broken, tokenizer).loglikelihood(requests(*TEXTS))


# --- scores -----------------------------------------------------------------------------------------------------------


def by_hand(model, tokenizer, task):
    """Value of every document of every metric, from the definitions as the papers of the tasks have them."""
    values = {"acc": [], "acc_norm": [], "perplexity": []}
    for row in HERE[task]:
        if task == "lambada_openai":
            context, _, word = row["text"].rpartition(" ")
            score, greedy = stock_score(model, tokenizer, context, " " + word)
            values["acc"].append(float(greedy))
            values["perplexity"].append(score)
            continue
        if task == "winogrande":  # the end of the sentence, given either beginning
            before, after = row["sentence"].split("_")
            answer, choices = int(row["answer"]) - 1, [row["option1"], row["option2"]]
            scores = [stock_score(model, tokenizer, before + c, " " + after.strip())[0] for c in choices]
        else:
            question = row["goal"] if task == "piqa" else row["question"]
            answer = row["label"]
            choices = [row["sol1"], row["sol2"]] if task == "piqa" else row["choices"]
            prompt = f"Question: {question}\nAnswer:"
            scores = [stock_score(model, tokenizer, prompt, " " + choice)[0] for choice in choices]
            per_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
            values["acc_norm"].append(float(np.argmax(per_character) == answer))
        values["acc"].append(float(np.argmax(scores) == answer))
    return {metric: found for metric, found in values.items() if found}


def scores_of(report: EvalReport, model: int, task: str):
    return {score.metric: score for score in report.models[model].scores if score.task == task}


@pytest.mark.parametrize("task", HERE)
def test_scores_and_differences_are_those_computed_by_hand(report, tiny, changed, tokenizer, task):
    other = load_checkpoint(changed, dtype=torch.float32).model
    ours, theirs = by_hand(other, tokenizer, task), by_hand(tiny.model, tokenizer, task)
    assert scores_of(report, 1, task).keys() == ours.keys()
    count = len(HERE[task])
    for metric, values in ours.items():
        dense, score = scores_of(report, 0, task)[metric], scores_of(report, 1, task)[metric]
        assert dense.difference is None
        if metric == "perplexity":
            values, reference = (np.exp(-np.mean(v)) for v in (values, theirs[metric]))
            assert score.value == pytest.approx(values, rel=1e-4)
            assert score.difference.value == pytest.approx(values - reference, rel=1e-3)
            assert score.higher_is_better is False
            continue
        assert score.value == pytest.approx(np.mean(values))
        assert score.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(count))
        differences = np.subtract(values, theirs[metric])
        assert score.difference.value == pytest.approx(differences.mean())
        assert score.difference.stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(count))


def test_the_two_models_differ_or_the_differences_above_say_nothing(report):
    assert any(score.difference.value for score in report.models[1].scores if score.metric.startswith("acc"))


def test_perplexity_of_the_text(report, data, tiny, tokenizer):
    tokens = tokenize(read_texts(data / "wikitext2" / "test.jsonl"), tokenizer)[: 6 * 256]
    expected = perplexity(tiny.model, tokens, 256)
    dense, other = (model.scores[0] for model in report.models)
    assert (dense.task, dense.metric, dense.value) == ("wikitext2", "perplexity", pytest.approx(expected.ppl, rel=1e-4))
    excess = report.models[1].excess.nats
    assert other.difference.value == pytest.approx(expected.ppl * math.expm1(excess), rel=1e-3)
    assert report.text.sha256 == read_texts(data / "wikitext2" / "test.jsonl").sha256


def measure(tasks, checkpoint, tokenizer, **options):
    found = run_tasks(tasks, checkpoint, tokenizer, **options)
    return {(one.task, one.metric): one for one in found}


def assert_equal_for_batch_sizes(tasks, limit, tokenizer):
    checkpoint = load_checkpoint("tiny", dtype=torch.float32)
    use_fast_scan(checkpoint.model)
    one, eight = (measure(tasks, checkpoint, tokenizer, limit=limit, batch_size=size) for size in (1, 8))
    assert one.keys() == eight.keys()
    for key, score in one.items():
        assert score.values == pytest.approx(eight[key].values, rel=1e-5), key
        assert score.documents == eight[key].documents
    return one


def test_scores_do_not_depend_on_the_batch_size(data, tokenizer):
    found = assert_equal_for_batch_sizes(load_tasks(list(HERE), data), 3, tokenizer)
    assert {key[0]: len(score.values) for key, score in found.items()} == {
        task: min(3, len(rows)) for task, rows in HERE.items()
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="the complete data of the six tasks lie in ../shared/data, not here")
def test_fifty_documents_of_each_of_the_six_tasks_do_not_depend_on_the_batch_size(tokenizer):
    tasks = load_tasks(SIX, SHARED, limit=50)
    assert [task.documents for task in tasks] == [1838, 500, 1267, 2376, 1172, 5153]
    found = assert_equal_for_batch_sizes(tasks, 50, tokenizer)
    assert {key[0] for key in found} == set(SIX)
    assert {len(score.values) for score in found.values()} == {50}


# --- statistics -------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_delta_method():
    g = np.random.default_rng(1)
    theirs = g.normal(3, 0.5, 400)
    ours = theirs + g.normal(0.1, 0.05, 400)
    expected = (np.exp(ours.mean()) * ours - np.exp(theirs.mean()) * theirs).std(ddof=1) / 20
    found = paired_difference(list(ours), list(theirs), exp_mean)
    assert found.value == pytest.approx(np.exp(ours.mean()) - np.exp(theirs.mean()))
    assert found.stderr == pytest.approx(expected, rel=0.1)
    assert standard_error(list(ours), exp_mean) == pytest.approx(np.exp(ours.mean()) * ours.std() / 20, rel=0.1)
    assert found == paired_difference(list(ours), list(theirs), exp_mean)


def test_one_document_has_no_standard_error():
    for aggregate in (None, exp_mean):
        assert standard_error([1.0], aggregate) is None
        assert paired_difference([1.0], [0.5], aggregate).stderr is None


def test_verdict(report):
    worse = report.models[1].scores[0]
    assert worse.difference.value > 2 * worse.difference.stderr  # or this test says nothing
    assert worse.verdict == "worse"
    assert report.dense.scores[0].verdict == ""


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done(report, data):
    assert [model.name for model in report.models] == ["tiny", "noisy"]
    assert [model.dense for model in report.models] == [True, False]
    assert [(t.name, t.documents, t.available, t.source) for t in report.tasks] == [
        (task, len(rows), len(rows), f"{task}.jsonl") for task, rows in HERE.items()
    ]
    assert {"ssmc", "torch", "lm_eval"} <= report.versions.keys()
    assert (report.device, report.dtype) == ("cpu", "float32")


def test_the_same_run_writes_the_same_bytes_without_the_names_of_folders(report, data, changed, tmp_path):
    again = evaluate_models(["tiny", changed], ",".join(HERE), data=data, window=256, max_windows=6, device="cpu")
    one, two = (r.write(tmp_path / f"{i}.json").read_text("utf-8") for i, r in enumerate((report, again)))
    assert one == two
    assert str(data.parent) not in one
    content = json.loads(one)
    assert content["schema"] == "ssmc-eval/1"
    (piqa,) = (s for s in content["models"][1]["scores"] if (s["task"], s["metric"]) == ("piqa", "acc"))
    assert piqa["difference"].keys() == {"value", "stderr"}


def test_what_no_evaluation_wrote_is_not_replaced(report, tmp_path):
    mine = tmp_path / "eval.json"
    mine.write_text("{}")
    with pytest.raises(OutputError, match="not written by ssmc eval"):
        report.write(mine)
    assert mine.read_text() == "{}"
    assert check_output(report.write(tmp_path / "new.json")) == tmp_path / "new.json"
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(tmp_path / "none" / "eval.json")


def test_a_limit_is_said(data):
    report = evaluate_models(["tiny"], "piqa", data=data, limit=2, perplexity=False, device="cpu")
    assert report.tasks[0].documents == 2
    assert any("Only the first 2 documents" in note for note in report.notes)
    assert report.text is None


def test_progress_ends_at_the_total(data):
    calls = []
    evaluate_models(
        ["tiny"], "piqa", data=data, limit=2, perplexity=False, device="cpu", progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == ("tasks of tiny", 4, 4)


def test_nothing_is_printed(data, capfd):
    evaluate_models(["tiny"], "lambada_openai", data=data, perplexity=False, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_other_users_of_the_libraries_get_their_progress_bars_back():
    before = lm_eval.api.task.tqdm
    with contextlib.suppress(KeyError), quiet():
        assert lm_eval.api.task.tqdm is not before
        assert not datasets.is_progress_bar_enabled()
        raise KeyError
    assert lm_eval.api.task.tqdm is before
    assert datasets.is_progress_bar_enabled()


# --- which models and which text --------------------------------------------------------------------------------------


def test_a_single_folder_of_compress_stands_for_the_dense_model_and_itself(tmp_path, changed):
    (changed / "ssmc.json").write_text(json.dumps({"schema": 1, "kind": "masked", "source": {"model": "tiny"}}))
    try:
        assert [(s.name, s.dense) for s in choose_sources([changed])] == [("tiny", True), ("noisy", False)]
        assert [s.name for s in choose_sources([changed], dense=TINY_DIRECTORY)] == ["tiny", "noisy"]
        assert [s.name for s in choose_sources([changed, "tiny"])] == ["noisy", "tiny"]
    finally:
        (changed / "ssmc.json").unlink()


def test_without_a_text_at_hand_tasks_are_still_run(data, tmp_path):
    shutil.copy(data / "tasks" / "piqa.jsonl", tmp_path)
    report = evaluate_models(["tiny"], "piqa", data=tmp_path, limit=2, device="cpu")
    assert report.text is None
    assert any("Perplexity was not measured" in note and "wikitext2.jsonl" in note for note in report.notes)
    with pytest.raises(CalibrationError, match=r"holds no wikitext2\.jsonl"):
        evaluate_models(["tiny"], data=tmp_path, device="cpu")


# --- wrong inputs -----------------------------------------------------------------------------------------------------
