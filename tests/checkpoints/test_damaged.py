"""Damaged weights: each an error that names the culprit."""

import json
import math
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.support.checkpoints import A_LOG, EMBEDDING, HEAD, LAYOUTS, NORM, change_json, refused
from tests.support.models import (
    PADDED,
    logits,
    random_model,
    save_transformers,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_tensor(damage, layout):
    refused(damage(layout, lambda t: t.pop(A_LOG)), "lacks", A_LOG)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_missing_tensors_are_not_all_listed(damage, layout):
    def remove(tensors):
        for name in [n for n in tensors if n.endswith(("A_log", ".D"))]:
            del tensors[name]

    refused(damage(layout, remove), "backbone.layers.0.mixer.A_log", "and 3 more")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extra_tensor(damage, layout):
    refused(damage(layout, lambda t: t.update({"backbone.layers.0.mixer.gate": torch.ones(2)})), "layers.0.mixer.gate")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misshapen_tensor(damage, layout):
    message = refused(damage(layout, lambda t: t.update({A_LOG: t[A_LOG][:, :4].clone()})), A_LOG)
    assert "(48, 4)" in message
    assert "(48, 6)" in message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_or_more_layers_than_the_config_says(damage, layout):
    def cut(tensors):
        for name in [n for n in tensors if n.startswith("backbone.layers.2.")]:
            del tensors[name]

    directory = damage(layout, cut)
    refused(directory, "2 layers", "says 3")
    key = "num_hidden_layers" if layout == "transformers" else "n_layer"
    change_json(directory / "config.json", **{key: 10**9})
    refused(directory, "1000000000 layers")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [A_LOG, EMBEDDING, NORM])
def test_numbers_that_are_none(damage, value, name):
    refused(damage("transformers", lambda t: t[name].view(-1)[-1:].fill_(value)), "NaN or infinity", name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.int64, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype(damage, dtype):
    message = refused(damage("transformers", lambda t: t.update({A_LOG: t[A_LOG].to(dtype)})), A_LOG)
    assert str(dtype).removeprefix("torch.") in message


def test_sparse_tensor(damage):
    refused(damage("mamba-ssm", lambda t: t.update({A_LOG: t[A_LOG].to_sparse()})), A_LOG, "sparse")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_called_tied_must_equal_the_embedding(damage, layout):
    directory = damage(layout, lambda t: t.update({HEAD: torch.randn(PADDED, 24)}))
    refused(directory, HEAD, "tied")


def test_a_tied_head_may_be_stored_in_transformers_layout(damage):
    directory = damage("transformers", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert torch.equal(logits(load_checkpoint(directory).model), logits(random_model()))


def test_a_tied_head_may_be_left_out_in_mamba_ssm_layout(damage):
    assert torch.equal(
        logits(load_checkpoint(damage("mamba-ssm", lambda t: t.pop(HEAD))).model), logits(random_model())
    )


def test_an_untied_head_must_be_there(tmp_path):
    save_transformers(random_model(), tmp_path / "m")
    change_json(tmp_path / "m" / "config.json", tie_word_embeddings=False)
    refused(tmp_path / "m", "lacks", HEAD)


def test_tensors_under_the_names_of_the_other_layout(damage):
    def rename(tensors):
        tensors["backbone.embedding.weight"] = tensors.pop(EMBEDDING)

    refused(damage("transformers", rename), EMBEDDING)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 5000, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_weights(tmp_path, model_directory, layout, keep):
    directory = shutil.copytree(model_directory(layout), tmp_path / "m")
    path = directory / ("model.safetensors" if layout == "transformers" else "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, path.name, "empty" if keep == 0 else "again")


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 100,
        b"\xff" * 8 + b"{}",
        (10).to_bytes(8, "little") + b"not json!!",
        b"\0" * 50,
        b"version https://git-lfs",
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_hold_something_else(tmp_path, model_directory, layout, content):
    directory = shutil.copytree(model_directory(layout), tmp_path / "m")
    path = directory / ("model.safetensors" if layout == "transformers" else "pytorch_model.bin")
    path.write_bytes(content)
    refused(directory, path.name)


def test_bits_flipped_in_the_header(tmp_path, model_directory):
    """No header a bit away from a good one may end in anything but the model or a sentence."""
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    path = directory / "model.safetensors"
    good = path.read_bytes()
    for position in range(0, 1200, 13):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            load_checkpoint(directory)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017


class Attack:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["zip", "old torch", "bare pickle", "protocol 0", "shard"])
def test_a_pickle_with_code_is_not_run(tmp_path, model_directory, layout, kind):
    directory = shutil.copytree(model_directory("mamba-ssm"), tmp_path / "m")
    if layout == "transformers":
        shutil.copyfile(model_directory() / "config.json", directory / "config.json")
    path, proof = directory / "pytorch_model.bin", tmp_path / "the-code-ran"
    content = torch.load(path, weights_only=True) | {A_LOG: Attack(proof)}
    if kind == "shard":
        path = path.rename(directory / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(content, path.name)}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if kind in ("zip", "shard", "old torch"):
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch")
    else:
        path.write_bytes(pickle.dumps({A_LOG: Attack(proof)}, protocol=0 if kind == "protocol 0" else None))
    refused(directory, path.name, "pickle", "nothing of it was run")
    assert not proof.exists()
    torch.load(path, weights_only=False) if kind in ("zip", "shard", "old torch") else pickle.loads(path.read_bytes())
    assert proof.exists()  # so the attack is real


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict'"),
        ({"epoch": 3}, "'epoch'"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({3: torch.ones(1)}, "3"),
    ],
)
def test_bin_files_that_are_no_state_dict(tmp_path, model_directory, content, named):
    directory = shutil.copytree(model_directory("mamba-ssm"), tmp_path / "m")
    torch.save(content, directory / "pytorch_model.bin")
    refused(directory, "pytorch_model.bin", named)


def test_old_bin_files_are_read(tmp_path, model_directory):
    """torch's format before 1.6 is a sequence of pickles; weights_only reads it too."""
    directory = shutil.copytree(model_directory("mamba-ssm"), tmp_path / "m")
    path = directory / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load_checkpoint(directory).model), logits(random_model()))


def test_sharded_bin_files_are_read(tmp_path, model_directory):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == shard}, directory / shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load_checkpoint(directory).model), logits(random_model()))


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    refused(sharded, victim.name, "is missing")


def test_index_and_shards_disagree(sharded):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={n: f for n, f in good.items() if n != A_LOG})
    refused(sharded, "does not name", A_LOG)
    change_json(index, weight_map=good | {"ghost": next(iter(good.values()))})
    refused(sharded, "no shard holds", "ghost")


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    one, two = (safetensors.torch.load_file(path) for path in (first, second))
    twice = next(iter(one))
    safetensors.torch.save_file(two | {twice: one[twice]}, second)
    refused(sharded, second.name, twice)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "weights.bin", "a\\b.safetensors", ""])
def test_an_index_must_not_lead_elsewhere(sharded, name):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=good | {A_LOG: name})
    refused(sharded, index.name, repr(name))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "model.safetensors.index.json")
