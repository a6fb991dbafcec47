"""Models of the Hugging Face hub, fetched with the real client from a small hub that runs here."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import ssmc
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.manifest import read_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.tokenizers import GPT_NEOX, load_tokenizer, tokenizer_directory
from ssmc.runtime.tiny import TINY_DIRECTORY, heldout_path
from tests.support.commandline import run
from tests.support.hub import serving
from tests.support.models import random_model, save_mamba_ssm, save_transformers


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path, monkeypatch) as found:
        yield found


def published(tmp_path):
    """A repository as they are: several formats, code, and pictures beside the model."""
    source = tmp_path / "published"
    shutil.copytree(TINY_DIRECTORY, source, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.jsonl"))
    for extra in ("pytorch_model.bin", "modeling.py", "picture.png", "onnx/model.safetensors", "onnx/config.json"):
        (source / extra).parent.mkdir(exist_ok=True)
        (source / extra).write_bytes(b"not for us")
    return source


def test_a_model_is_fetched_without_what_is_not_needed(hub, tmp_path, tiny):
    hub.repositories["owner/stories"] = published(tmp_path)
    checkpoint = load_checkpoint("owner/stories", dtype=torch.float32)
    assert checkpoint.source == "owner/stories"
    assert torch.equal(checkpoint.model.lm_head.weight, tiny.model.lm_head.weight)
    model = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    along = ["README.md", "modeling.py"]  # with whatever is made of the model; code is not run
    assert sorted(hub.fetched) == sorted([*along, *model])
    assert load_tokenizer(checkpoint)("Once")["input_ids"] == load_tokenizer(tiny)("Once")["input_ids"]


def test_bin_is_fetched_where_there_is_no_safetensors(hub, tmp_path):
    hub.repositories["state-spaces/small"] = save_mamba_ssm(random_model(), tmp_path / "m")
    assert load_checkpoint("state-spaces/small").format == "mamba-ssm"
    assert sorted(hub.fetched) == ["config.json", "pytorch_model.bin"]


def test_what_was_fetched_once_needs_no_network(hub, tmp_path):
    hub.repositories |= {"owner/stories": published(tmp_path), "o/bin": save_mamba_ssm(random_model(), tmp_path / "m")}
    first = load_checkpoint("owner/stories"), load_checkpoint("o/bin")
    hub.close()
    assert load_checkpoint("owner/stories").directory == first[0].directory
    assert load_checkpoint("o/bin").directory == first[1].directory
    with pytest.raises(CheckpointError, match=r"no folder 'owner/other' here.*no connection.*name the folder"):
        load_checkpoint("owner/other")


def test_no_network_on_purpose(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'owner/stories'.*no connection"):
        load_checkpoint("owner/stories")


def test_models_that_are_not_there_or_closed(hub):
    with pytest.raises(CheckpointError, match=r"'owner/typo'.*no model of the hub.*Check the name"):
        load_checkpoint("owner/typo")
    hub.closed.add("owner/closed")
    with pytest.raises(CheckpointError, match=r"'owner/closed'.*closed.*hf auth login"):
        load_checkpoint("owner/closed")


def test_a_folder_of_that_name_comes_first(hub, tmp_path):
    hub.repositories["owner/stories"] = published(tmp_path)
    save_mamba_ssm(random_model(), Path("owner/stories"))
    assert load_checkpoint("owner/stories").format == "mamba-ssm"
    assert hub.fetched == []


def test_published_mamba_ssm_models_get_the_tokenizer_they_mean(hub, tmp_path):
    hub.repositories[GPT_NEOX] = published(tmp_path)  # the tokenizer's content does not matter here
    model = random_model(vocab_size=50280, hidden_size=8, num_hidden_layers=1)
    directory = save_mamba_ssm(model, tmp_path / "m", config={"vocab_size": 50277})
    checkpoint = load_checkpoint(directory)
    assert len(load_tokenizer(checkpoint)) == 4096
    assert sorted(hub.fetched) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert tokenizer_directory(checkpoint).parts[-3].startswith("models--EleutherAI")


def test_without_network_and_tokenizer(hub, tmp_path):
    hub.close()
    model = random_model(vocab_size=50280, hidden_size=8, num_hidden_layers=1)
    checkpoint = load_checkpoint(save_mamba_ssm(model, tmp_path / "m", config={"vocab_size": 50277}))
    assert tokenizer_directory(checkpoint) is None
    with pytest.raises(CheckpointError, match=r"without a tokenizer.*--tokenizer"):
        load_tokenizer(checkpoint)


def test_another_tokenizer_by_hub_id(hub, tmp_path, tiny):
    hub.repositories["owner/stories"] = published(tmp_path)
    assert len(load_tokenizer(tiny, "owner/stories")) == 4096
    assert "model.safetensors" not in hub.fetched
    with pytest.raises(CheckpointError, match="owner/typo"):
        load_tokenizer(tiny, "owner/typo")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path, tiny, capsys):
    hub.repositories["owner/stories"] = published(tmp_path)
    hub.tags.add("v1.0")
    checkpoint = load_checkpoint("owner/stories@v1.0")
    assert checkpoint.source == "owner/stories@v1.0"  # so that a manifest says it
    assert hub.asked == ["v1.0"]
    model, _ = ssmc.load("owner/stories", torch.float32, revision="v1.0")
    assert torch.equal(model.lm_head.weight, tiny.model.lm_head.weight)
    done = run(capsys, "inspect", "owner/stories", "--revision", "v1.0")
    assert done.code == 0, done.err
    blind = ("--score", "magnitude", "--no-repair", "--out", tmp_path / "out")
    done = run(capsys, "compress", "owner/stories", "--revision", "v1.0", *blind)
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "out").source.model == "owner/stories@v1.0"
    done = run(capsys, "export", "owner/stories", "--revision", "v1.0", "--format", "onnx", "--out", tmp_path / "onnx")
    assert done.code == 0, done.err
    heldout = ("--text", heldout_path(), "--window", "32", "--max-windows", "1")
    done = run(capsys, "eval", "tiny", "--dense", "owner/stories", "--revision", "v1.0", *heldout)
    assert done.code == 0, done.err
    assert set(hub.asked) == {"v1.0"}
    with pytest.raises(CheckpointError, match="owner/stories of the hub has no revision 'v9'"):
        load_checkpoint("owner/stories@v9")


def test_to_look_at_a_model_its_weights_stay_on_the_hub(hub, tmp_path, capsys):
    shards = save_transformers(random_model(), tmp_path / "m", max_shard_size="8KB")
    hub.repositories |= {"owner/stories": published(tmp_path), "owner/shards": shards}
    hub.tags.add("v1.0")
    records = []
    for number, model in enumerate((TINY_DIRECTORY, "owner/stories@v1.0", shards, "owner/shards")):
        done = run(capsys, "inspect", model, "--json", tmp_path / f"{number}.json")
        assert done.code == 0, done.err
        records.append(json.loads((tmp_path / f"{number}.json").read_text()) | {"source": None})
    assert records[0] == records[1]
    assert records[2] == records[3]
    assert sorted(hub.fetched) == ["config.json", "config.json", "model.safetensors.index.json"]
    assert hub.looked_into["model.safetensors"] < 200_000 < (TINY_DIRECTORY / "model.safetensors").stat().st_size


def test_a_revision_of_what_is_not_on_the_hub_is_refused(hub, tmp_path, capsys):
    save_mamba_ssm(random_model(), tmp_path / "m")
    for source in ("tiny", str(tmp_path / "m"), "owner/stories@v1.0"):
        done = run(capsys, "inspect", source, "--revision", "v2")
        assert done.code != 0
        assert "Leave --revision out" in done.err
    assert "none is named; at bench and eval it is that of --dense" in run(capsys, "eval", "x", "--revision", "v2").err
    assert "Leave --revision out" in run(capsys, "bench", "--dense", "tiny", "--revision", "v2").sentence(2)
    assert hub.asked == []


def test_one_set_of_weights_is_fetched(hub, tmp_path):
    """Shards, where there are other formats and a consolidated file of somebody's own beside them."""
    directory = save_transformers(random_model(), tmp_path / "m", max_shard_size="8KB")
    shards = {path.name for path in directory.glob("model-*.safetensors")}
    assert len(shards) > 1
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.gguf"):
        (directory / extra).write_bytes(b"not for us")
    hub.repositories["owner/shards"] = directory
    checkpoint = load_checkpoint("owner/shards")
    assert torch.equal(checkpoint.model.lm_head.weight, random_model().lm_head.weight)
    others = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(hub.fetched) == shards | others
    assert len(hub.fetched) == len(set(hub.fetched))
