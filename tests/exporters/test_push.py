"""Exports published on a hub that runs here, by the real client, and read again from there."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.hub import push
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.support.commandline import run
from tests.support.hub import TOKEN, serving
from tests.support.models import random_model, save_transformers

README = "---\nlicense: cc-by-4.0\nlanguage: en\ndatasets:\n- roneneldan/TinyStories\n---\n\n# Stories\n"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A compressed model whose dense one has a card of its own, and its export."""
    folder = tmp_path_factory.mktemp("push")
    model = save_transformers(random_model(), folder / "dense")
    (model / "README.md").write_text(README)
    (model / "LICENSE").write_text("Creative Commons Attribution 4.0 International\n")
    compress(str(model), out=folder / "half", sparsity=0.5, score="magnitude", repair=False)
    export(folder / "half")
    return folder / "half"


@pytest.fixture
def exported(artefact):
    return artefact / "safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_what_is_pushed_is_read_again(hub, token, exported, capsys):
    done = run(capsys, "push", exported, "me/half", "--private", "--base-model", "someone/stories")
    assert done.code == 0, done.err
    assert "Uploaded" in done.words
    assert hub.private == {"me/half"}
    commit, files = hub.pushed["me/half"]["main"]
    assert commit in done.words.replace(" ", "")
    assert set(hub.objects.values()) >= {(exported / "model.safetensors").read_bytes()}  # by LFS
    again, here = load_checkpoint("me/half"), load_checkpoint(exported)
    assert all(torch.equal(tensor, here.tensors()[name]) for name, tensor in again.tensors().items())
    for name in json.loads((exported / "ssmc.json").read_text())["files"]:
        assert files["README-model.md" if name == "README.md" else name] == (exported / name).read_bytes()


def test_the_card_says_what_it_is_in_the_hubs_words(hub, token, exported, tmp_path):
    figures = tmp_path / "eval.json"
    parameters = json.loads((exported / "ssmc.json").read_text())["parameters"]
    score = {"task": "piqa", "metric": "acc", "value": 0.625}
    model = {"name": "half", "dense": False, "parameters": parameters, "perplexity": {"ppl": 14.25}, "excess": None}
    report = {"schema": "ssmc-eval/1", "text": {"source": "held-out.txt"}, "models": [model | {"scores": [score]}]}
    figures.write_text(json.dumps(report))
    pushed = push(exported, "me/half", base_model="someone/stories", figures=(figures,))
    content = hub.pushed["me/half"]["main"][1]["README.md"].decode()
    assert content == pushed.card
    card = ModelCard(content)  # the client's own reading
    card.data.to_dict()
    front = yaml.safe_load(content.split("---")[1])
    assert front["base_model"] == "someone/stories"
    assert front["base_model_relation"] == "finetune"
    assert (front["license"], front["language"], front["datasets"]) == ("cc-by-4.0", "en", ["roneneldan/TinyStories"])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"ssmc", "pruned", "state-space-model", "safetensors"} <= set(front["tags"])
    found = {result.metric_type: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert found == {"perplexity": (14.25, "held-out.txt"), "acc": (0.625, "piqa")}
    assert "Pattern `column`, sparsity 0.5" in content
    assert "ssmc compress --recipe recipe.yaml" in content


def test_the_manifest_that_is_published_names_no_place_of_this_machine(hub, token, exported, tmp_path):
    push(exported, "me/half")
    files = hub.pushed["me/half"]["main"][1]
    local = str(exported.parent.parent)
    assert local in (exported / "ssmc.json").read_text()
    assert all(local.encode() not in content for content in files.values())
    assert json.loads(files["ssmc.json"])["source"]["model"] == "dense"


def test_a_branch(hub, token, exported):
    push(exported, "me/half")
    first = hub.pushed["me/half"]["main"]
    push(exported, "me/half", branch="v2", license="mit")  # which begins as main is
    assert hub.pushed["me/half"]["main"] == first
    assert b"license: mit" in hub.pushed["me/half"]["v2"][1]["README.md"]
    assert b"license: cc-by-4.0" in first[1]["README.md"]
    assert load_checkpoint("me/half@v2").parameters == load_checkpoint("me/half").parameters
    with pytest.raises(OutputError, match="files already"):
        push(exported, "me/half", branch="v2")


def test_what_is_there_is_not_replaced_unasked(hub, token, exported):
    push(exported, "me/half")
    hub.pushed["me/half"]["main"][1]["notes.txt"] = b"mine"
    before = hub.pushed["me/half"]["main"]
    with pytest.raises(OutputError, match=r"me/half holds \d+ files already.*--force"):
        push(exported, "me/half")
    assert hub.pushed["me/half"]["main"] == before
    pushed = push(exported, "me/half", force=True, license="mit")
    assert pushed.others == ("notes.txt",)
    assert hub.pushed["me/half"]["main"][1]["notes.txt"] == b"mine"
    assert b"license: mit" in hub.pushed["me/half"]["main"][1]["README.md"]


def test_a_commit_that_comes_in_between_is_not_overwritten(hub, token, exported, monkeypatch):
    push(exported, "me/half")
    batch = hub.preupload

    def meanwhile(self, files):
        self.pushed["me/half"]["main"] = ("a" * 40, {"theirs": b"1"})
        batch(self, files)

    monkeypatch.setattr(hub, "preupload", meanwhile)
    with pytest.raises(OutputError, match="changed by somebody else meanwhile"):
        push(exported, "me/half", force=True, license="mit")
    assert hub.pushed["me/half"]["main"] == ("a" * 40, {"theirs": b"1"})


def test_a_dry_run_asks_nothing_of_the_hub(hub, exported, capsys):
    done = run(capsys, "push", exported, "me/half", "--dry-run")
    assert done.code == 0, done.err
    assert "license: cc-by-4.0" in done.out
    assert "model.safetensors" in done.out
    assert "Would upload" in done.words
    assert (hub.posts, hub.asked) == ([], [])


def test_what_is_refused(hub, exported, artefact, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match=r"no token.*hf auth login"):
        push(exported, "me/half")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(OutputError, match="does not know this token"):
        push(exported, "me/half")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OutputError, match=r"may not write other/half"):
        push(exported, "other/half")
    with pytest.raises(UsageError, match="not an export"):
        push(artefact, "me/half")
    for name in ("half", "me/half/1", "me/..", "https://hub/me/half"):
        with pytest.raises(UsageError, match="owner/name"):
            push(exported, name)
    assert "no compressed model" in run(capsys, "push", tmp_path, "me/half").sentence(2)
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not the file that was exported"):
        push(broken, "me/half")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        push(broken, "me/half")
    record = json.loads((exported / "ssmc.json").read_text())
    record["files"]["../recipe.yaml"] = record["files"].pop("config.json")
    (broken / "ssmc.json").write_text(json.dumps(record))
    shutil.copy(exported / "model.safetensors", broken)
    with pytest.raises(CheckpointError, match="outside its folder"):
        push(broken, "me/half")
    wrong = tmp_path / "bench.json"
    wrong.write_text('{"schema": "ssmc-bench/1", "models": []}')
    with pytest.raises(UsageError, match="none of its figures"):
        push(exported, "me/half", figures=(wrong,))
    hub.close()
    with pytest.raises(OutputError, match=r"could not be written on the hub"):
        push(exported, "me/half")
    assert hub.pushed == {}
