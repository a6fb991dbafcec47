"""Documents of tasks in local files, and what an evaluation refuses."""

import gzip
import json
import sys

import pytest

from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.evaluation import evaluate_models
from tests.support.tasks import ARC, PIQA, SIX, WINOGRANDE, write_lines

pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")


from ssmc.runtime.evaluation.tasks import find_definitions, load_tasks


@pytest.mark.parametrize("form", ["hub", "list"])
def test_arc_reads_the_hubs_form_as_well_as_a_list_with_a_number(tmp_path, form):
    rows = ARC
    if form == "hub":
        rows = [
            {"question": r["question"], "answerKey": "1234"[r["label"]], "choices": {"text": r["choices"]}} for r in ARC
        ]
        for row in rows:
            row["choices"]["label"] = list("1234"[: len(row["choices"]["text"])])
    write_lines(tmp_path / "arc_challenge.jsonl", rows)
    (loaded,) = load_tasks(["arc_challenge"], tmp_path)
    task = loaded.task
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [row["label"] for row in ARC]
    assert [task.doc_to_choice(doc) for doc in task.eval_docs] == [row["choices"] for row in ARC]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"limit": -3}, "limit must be at least 1, not -3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"window": 1}, "window must be at least 2"),
        ({"tasks": "piqa,,arc_easy"}, "empty name"),
        ({"tasks": "piqa_easy"}, "no task 'piqa_easy'. Did you mean piqa"),
        ({"tasks": "mmlu"}, "mmlu is a group"),
    ],
)
def test_wrong_options(data, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_models(["tiny"], **({"tasks": "piqa", "data": data} | options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no documents for piqa: there is no piqa.jsonl in it"),
        ("", "holds no document"),
        ("\n\n", "holds no document"),
        ('{"goal": ', "line 1, is not JSON"),
        ("[1]\n", "line 1, is not a JSON object"),
        (b"\xff\xfd", "is not UTF-8"),
        (json.dumps(PIQA[0]) + '\n\n{"goal": "x"}\n', "line 3, has the fields goal, line 1 has goal, sol1"),
        ('{"question": "x"}\n', "does not fit lm-eval's task piqa"),
        (json.dumps(PIQA[0]) + "\n" + json.dumps(PIQA[0] | {"label": 2}), "line 2, does not fit .* 2 choices"),
        (json.dumps(PIQA[0]) + "\n" + json.dumps(PIQA[0] | {"sol2": ""}), "line 2, does not fit .* an empty choice"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message):
        load_tasks(["piqa"], tmp_path)


def test_marks_surrogates_and_compression_are_read_as_in_any_text(tmp_path):
    rows = [PIQA[0] | {"goal": "a \ud835 b"}, *PIQA[1:]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "piqa.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode()))
    (loaded,) = load_tasks(["piqa"], tmp_path)
    assert [doc["goal"] for doc in loaded.task.eval_docs] == ["a � b", *(row["goal"] for row in PIQA[1:])]


@pytest.mark.parametrize("label", [4, -1, "A", None, True])
def test_a_wrong_label_of_arc(tmp_path, label):
    write_lines(tmp_path / "arc_easy.jsonl", [ARC[0], ARC[2] | {"label": label}])
    with pytest.raises(CalibrationError, match=r'line 2, has "choices" as a list but no "label"'):
        load_tasks(["arc_easy"], tmp_path)


def test_a_winogrande_sentence_without_a_gap_is_named_by_its_line(tmp_path):
    write_lines(tmp_path / "winogrande.jsonl", [*WINOGRANDE, WINOGRANDE[0] | {"sentence": "No gap."}])
    with pytest.raises(CalibrationError, match="line 3, does not fit lm-eval's task winogrande"):
        load_tasks(["winogrande"], tmp_path)
    assert load_tasks(["winogrande"], tmp_path, limit=2)[0].documents == 3  # what is not scored is not checked


def test_a_missing_folder(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist"):
        load_tasks(["piqa"], tmp_path / "none")


def test_a_task_that_reads_its_documents_itself_cannot_have_local_ones(tmp_path):
    write_lines(tmp_path / "squadv2.jsonl", [{"question": "x"}])
    with pytest.raises(UsageError, match="cannot use --data"):
        load_tasks(["squadv2"], tmp_path)


def test_missing_lm_eval(data, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # makes the import fail
    with pytest.raises(UsageError, match=r"pip install 'ssmc\[eval\]'"):
        evaluate_models(["tiny"], "piqa", data=data)
    report = evaluate_models(["tiny"], data=data, window=256, max_windows=1, device="cpu")
    assert report.dense.perplexity.windows == 1


def test_the_definitions_are_lm_evals_own():
    found = find_definitions(SIX)
    assert [path.parent.name for path in found.values()] == [
        "piqa", "openbookqa", "winogrande", "arc", "arc", "lambada"
    ]  # fmt: skip
    assert all("lm_eval" in path.parts for path in found.values())
