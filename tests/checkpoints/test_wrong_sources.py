"""Configurations and paths that are not those of a model: each an error that names the culprit."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from ssmc.runtime.errors import OutputError, UsageError
from ssmc.runtime.files import new_directory
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from tests.support.checkpoints import (
    LAYOUTS,
    change_json,
    refused,
)
from tests.support.models import (
    logits,
)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"mamba"', "{'a': 1}", "[" * 100_000, "null"])
def test_config_that_is_no_json_object(tmp_path, model_directory, content):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "config.json").write_text(content)
    refused(directory, "config.json", "again")


def test_config_that_is_no_text(tmp_path, model_directory):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(directory, "config.json")


@pytest.mark.parametrize(
    ("layout", "keys"),
    [("transformers", ["vocab_size", "hidden_size", "num_hidden_layers"]), ("mamba-ssm", ["n_layer", "vocab_size"])],
)
def test_config_without_sizes(tmp_path, model_directory, layout, keys):
    directory = shutil.copytree(model_directory(layout), tmp_path / "m")
    change_json(directory / "config.json", **dict.fromkeys(keys))
    refused(directory, "config.json", "does not say", *keys)


@pytest.mark.parametrize("model_type", ["llama", "zamba", "recurrent_gemma", "", 7, ["mamba"]])
def test_another_architecture(tmp_path, model_directory, model_type):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    change_json(directory / "config.json", model_type=model_type)
    refused(directory, "m", repr(model_type), "mamba")


def test_config_of_nothing_known(tmp_path, model_directory):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "config.json").write_text('{"layers": 3}')
    refused(directory, "model_type", "d_model")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": -24}, "d_model -24"),
        ({"hidden_size": 0}, "d_model 0"),
        ({"state_size": 0}, "d_state 0"),
        ({"state_size": 2.5}, "state_size"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"num_hidden_layers": 0}, "n_layer 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"intermediate_size": "48"}, "d_inner '48'"),
        ({"intermediate_size": 0}, "d_inner 0"),
        ({"intermediate_size": 10**15}, "1000000000000000"),
        ({"time_step_rank": "many"}, "many"),
        ({"time_step_rank": 0}, "dt_rank 0"),
        ({"conv_kernel": 0}, "d_conv 0"),
        ({"expand": 1.5}, "expand"),
        ({"hidden_act": "sinus"}, "sinus"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
    ],
    ids=str,
)
def test_config_with_values_that_make_no_sense(tmp_path, model_directory, values, named):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    change_json(directory / "config.json", **values)
    refused(directory, named, "config.json")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ssm_cfg": {"layer": "Mamba3", "d_state": 6}}, "Mamba3"),
        ({"ssm_cfg": {"headdim": 64}}, "headdim"),
        ({"ssm_cfg": [1]}, "ssm_cfg"),
        ({"ssm_cfg": {"expand": "2"}}, "expand"),
        ({"ssm_cfg": {"d_state": "six"}}, "six"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 96}, "d_intermediate"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"vocab_size": "61"}, "vocab_size"),
        ({"vocab_size": 40}, "(64, 24)"),
        ({"d_model": "24"}, "d_model"),
        ({"n_layer": 4}, "4"),
    ],
    ids=str,
)
def test_mamba_ssm_configs_that_are_not_mamba_1(tmp_path, model_directory, values, named):
    directory = shutil.copytree(model_directory("mamba-ssm"), tmp_path / "m")
    change_json(directory / "config.json", **values)
    refused(directory, named)


def test_no_such_path(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **_: asked.append(arguments))
    monkeypatch.chdir(tmp_path)
    sources = [
        "./nowhere",
        "../nowhere/model",
        "~/nowhere",
        "/nowhere/model",
        "nowhere",
        "a/b/c",
        "a b/c",
        "~nobody-here/x",
        "",
        " ",
    ]
    for source in [*sources, tmp_path / "nowhere", Path("owner/name"), "owner/-name", "nul\0l/x", "x" * 300]:
        refused(source, str(source).replace("\0", "\\x00"))
    assert asked == []


def test_a_file_is_not_a_model(model_directory):
    refused(model_directory() / "config.json", "is a file")


def test_a_directory_that_is_not_a_model(tmp_path, model_directory):
    refused(tmp_path, "config.json")
    shutil.copyfile(model_directory() / "config.json", tmp_path / "config.json")
    refused(tmp_path, "no weights", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_file(tmp_path, model_directory, name):
    shutil.copyfile(model_directory() / "config.json", tmp_path / "config.json")
    (tmp_path / name).mkdir()
    refused(tmp_path, name)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("nowhere")
    refused(tmp_path, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unreadable_files(model_directory, monkeypatch, layout):
    """Permissions do not bind root, so the refusal of the system is played."""
    directory = model_directory(layout)
    path = directory / ("model.safetensors" if layout == "transformers" else "pytorch_model.bin")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as context:
        context.setattr("ssmc.runtime.models.checkpoints.weight_files.safe_open", refuse)
        context.setattr(torch, "load", refuse)
        refused(directory, path, "Permission denied")
    with monkeypatch.context() as context:
        context.setattr(Path, "read_text", refuse)
        refused(directory, directory / "config.json", "Permission denied")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_really_unreadable_files(tmp_path, model_directory):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "model.safetensors").chmod(0)
    refused(directory, "model.safetensors", "Permission denied")


def test_dtypes_one_cannot_compute_in(model_directory):
    with pytest.raises(UsageError, match="int8"):
        load_checkpoint(model_directory(), dtype=torch.int8)


def test_an_output_below_the_model_can_be_written_while_it_is_mapped(tmp_path, model_directory):
    """Weights read from safetensors are mapped from the file: replacing the directory must not change them."""
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "ssmc.json").write_text("{}")
    checkpoint = load_checkpoint(directory)
    before = logits(checkpoint.model)
    zeros = {name: torch.ones_like(tensor) for name, tensor in checkpoint.tensors().items()}
    with new_directory(directory, force=True) as folder:
        write_checkpoint(folder, zeros, checkpoint.config)
    assert torch.equal(logits(checkpoint.model), before)
    assert not torch.equal(logits(load_checkpoint(directory).model), before)
    with pytest.raises(OutputError):
        new_directory(directory, force=True).__enter__()
