"""`ssmc eval` as a user runs it: the tables, the file, and one sentence for what goes wrong."""

import inspect
import json
import sys

import pytest

from ssmc.cli import main
from ssmc.cli.commands.eval import evaluate as eval_command
from ssmc.runtime.evaluation import evaluate_models
from tests.support.commandline import run, run_process

pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")

USAGE, CHECKPOINT, CALIBRATION, OUTPUT = 2, 3, 4, 5
PIQA = [
    {"goal": "Find a small planet.", "sol1": "Look at the sky at night.", "sol2": "Purple the of.", "label": 0},
    {"goal": "Swim.", "sol1": "Jump into the lake.", "sol2": "Jump into the stone.", "label": 0},
    {"goal": "Make a friend.", "sol1": "Say nothing, ever.", "sol2": "Say hello with a smile.", "label": 1},
]
STORY = "Once upon a time there was a little robot who lived near the sea. Every day it looked for a friend. "


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands run in an empty folder and a wide terminal."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    (folder / "wikitext2.jsonl").write_text("".join(json.dumps({"text": STORY * n}) + "\n" for n in (1, 3, 9)))
    return folder


def test_an_artefact_beside_its_dense_model(capsys, here, data):
    assert main(["compress", "tiny", "--score", "magnitude", "--no-repair", "--sparsity", "0.9", "--quiet"]) == 0
    outcome = run(capsys, "eval", "--tasks", "piqa", "--data", data, "--window", "64", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    written = here / "ssmc-out" / "eval.json"
    assert outcome.out.splitlines()[-1] == "Wrote ssmc-out/eval.json."
    report = json.loads(written.read_text("utf-8"))
    assert [(m["name"], m["dense"]) for m in report["models"]] == [("tiny", True), ("ssmc-out", False)]
    dense, compressed = (model["scores"] for model in report["models"])
    assert [(s["task"], s["metric"]) for s in dense] == [
        ("wikitext2", "perplexity"),
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
    ]
    for ours, theirs in zip(compressed, dense, strict=True):
        found = ours["difference"]["value"]
        assert found == pytest.approx(ours["value"] - theirs["value"], abs=1e-9)
        for number in (f" {theirs['value']:.4g} ± ", f" {ours['value']:.4g} ± ", f" {found:+.4g} ± "):
            assert number in outcome.out
    assert compressed[0]["difference"]["value"] > 0
    assert "3 of 3 documents of piqa" in outcome.words


def test_named_models_write_to_the_current_folder_and_replace_their_report(capsys, here, data):
    for _ in range(2):
        outcome = run(capsys, "eval", "tiny", "--data", data, "--window", "64", "--max-windows", "2", "--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    report = json.loads((here / "eval.json").read_text("utf-8"))
    assert report["models"][0]["perplexity"]["windows"] == 2
    assert report["models"][0]["scores"][0]["difference"] is None


def test_the_defaults_are_those_of_the_library():
    typed, library = (inspect.signature(f).parameters for f in (eval_command, evaluate_models))
    same = typed.keys() & library.keys() - {"models", "tasks", "max_windows"}  # these mean the same by other values
    assert len(same) >= 10
    assert all(typed[name].default == library[name].default for name in same)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny", "--tasks", "piqa", "--limit", "0"], USAGE, "limit must be at least 1"),
        (["tiny", "--tasks", "no_such_task_at_all"], USAGE, "no task 'no_such_task_at_all'"),
        (["tiny", "--tasks", "arc_easy"], CALIBRATION, "no documents for arc_easy"),
        (["none", "--tasks", "piqa"], CHECKPOINT, "none"),
        ([], USAGE, "Run `ssmc compress MODEL` first"),
        (["tiny", "--out", "none/eval.json"], OUTPUT, "none is not a folder"),
        (["tiny", "--text", "none.txt"], CALIBRATION, "There is no text at 'none.txt'"),
    ],
)
def test_wrong_inputs(capsys, here, data, arguments, code, message):
    assert message in run(capsys, "eval", *arguments, "--data", data).sentence(code)
    assert not list(here.iterdir())


def test_a_broken_line(capsys, data):
    with (data / "piqa.jsonl").open("a") as file:
        file.write("{broken\n")
    assert "piqa.jsonl, line 4, is not JSON" in run(capsys, "eval", "tiny", "--tasks", "piqa", "--data", data).sentence(
        4
    )


def test_a_foreign_report_is_left_alone(capsys, here, data):
    (here / "eval.json").write_text("mine")
    assert "was not written by ssmc eval" in run(capsys, "eval", "tiny", "--data", data).sentence(OUTPUT)
    assert (here / "eval.json").read_text() == "mine"


def test_without_lm_eval(capsys, monkeypatch, data):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sentence = run(capsys, "eval", "tiny", "--tasks", "piqa", "--data", data).sentence(USAGE)
    assert "pip install 'ssmc[eval]'" in sentence


def test_offline_without_local_data(here, tmp_path):
    """As its own process: whether the hub may be asked is read when its library is imported."""
    outcome = run_process(
        "eval", "tiny", "--tasks", "piqa", cwd=here, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")
    )
    sentence = outcome.sentence(CALIBRATION)
    assert "documents of piqa could not be loaded" in sentence
    assert sentence.endswith("Without a network, give a folder that holds piqa.jsonl with --data.")
    assert not list(here.iterdir())


def test_answers_to_constructed_questions_are_shown_where_the_first_model_has_some(capsys, data, monkeypatch):
    from ssmc.runtime.evaluation.constructed import Constructed
    from ssmc.runtime.measure.mqar import Answers

    def answer(model, questions, batch):
        return tuple(
            Constructed(task, (Answers(2, 62, 40, part, 0.01), Answers(2, 16, 40, part / 2, 0.02)))
            for task, part in (("passkey", 0.05), ("mqar", 0.875))
        )

    monkeypatch.setattr("ssmc.runtime.evaluation.evaluate.answer", answer)
    asked = ("--text", data / "wikitext2.jsonl", "--window", "64", "--max-windows", "1", "--device", "cpu")
    outcome = run(capsys, "eval", "tiny", "tiny", "--recall", *asked)
    assert outcome.code == 0, outcome.err
    said = " ".join((outcome.out + outcome.err).split())
    assert "Right answers: values of listed keys" in said
    assert "87.5% ± 1.0%" in said
    assert "43.8% ± 2.0%" in said
    assert "Right answers: passkeys" not in said
    assert "answers 5% of the questions for passkeys hidden in the text: it has no such recall to lose" in said
