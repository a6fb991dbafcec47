"""Both layouts read exactly, as stock transformers reads them."""

import json
import shutil

import pytest
import torch
from transformers import MambaForCausalLM

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint, parameter_count, unpadded_vocab_size, write_checkpoint
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.checkpoints import DTYPES, HEAD, LAYOUTS, change_json, same, stock, write
from tests.support.models import (
    PADDED,
    VOCAB,
    logits,
    random_model,
    save_mamba_ssm,
    save_transformers,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_transformers_directories_are_read_as_transformers_reads_them(model_directory, dtype, sharded):
    directory = model_directory("transformers", dtype, sharded)
    assert (directory / "model.safetensors.index.json").exists() == sharded
    ours, theirs = load_checkpoint(directory), stock(directory)
    assert type(ours.model) is MambaForCausalLM
    assert not ours.model.training
    assert same(ours.model.state_dict(), theirs.state_dict())
    assert torch.equal(logits(ours.model), logits(theirs))
    assert ours.format == "transformers"
    assert (ours.source, ours.directory) == (str(directory), directory)
    assert set(ours.dtypes.values()) == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba_ssm_directories_are_read(model_directory, dtype):
    checkpoint = load_checkpoint(model_directory("mamba-ssm", dtype))
    expected = random_model(dtype)
    assert checkpoint.format == "mamba-ssm"
    assert same(checkpoint.model.state_dict(), expected.state_dict())
    assert torch.equal(logits(checkpoint.model), logits(expected))
    assert checkpoint.dimensions.vocab_size == PADDED
    assert unpadded_vocab_size(checkpoint.config) == VOCAB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_is_really_tied(model_directory, layout):
    checkpoint = load_checkpoint(model_directory(layout))
    model = checkpoint.model
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert HEAD not in checkpoint.tensors()
    assert HEAD not in checkpoint.dtypes
    assert parameter_count(checkpoint.tensors()) == sum(p.numel() for p in model.parameters())
    assert parameter_count(model.state_dict()) == sum(p.numel() for p in model.parameters())


def test_an_untied_head_is_kept(tmp_path):
    model = random_model(tie_word_embeddings=False)
    save_transformers(model, tmp_path / "t")
    save_mamba_ssm(model, tmp_path / "m")
    for directory in (tmp_path / "t", tmp_path / "m"):
        checkpoint = load_checkpoint(directory)
        assert torch.equal(checkpoint.model.lm_head.weight, model.lm_head.weight)
        assert not torch.equal(checkpoint.model.lm_head.weight, checkpoint.model.backbone.embeddings.weight)
        for name in LAYOUTS:
            again = load_checkpoint(write(directory / name, checkpoint, format=name))
            assert same(again.tensors(), checkpoint.tensors())
            assert not again.config.tie_word_embeddings


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_a_dtype_in_memory_does_not_change_what_is_stored(model_directory, stored, asked):
    checkpoint = load_checkpoint(model_directory("transformers", stored), dtype=asked)
    assert {p.dtype for p in checkpoint.model.parameters()} == {asked}
    assert checkpoint.config.dtype == stored
    assert {t.dtype for t in checkpoint.tensors().values()} == {stored}
    if asked is torch.float32:  # upcasting and back is exact
        assert same(checkpoint.tensors(), load_checkpoint(checkpoint.directory).tensors())


def test_mixed_dtypes_are_kept_tensor_by_tensor(tmp_path, model_directory):
    """Training in bfloat16 often leaves A_log and D in float32; odd sizes also misalign what follows in the file."""
    tensors = load_checkpoint(model_directory("transformers", torch.bfloat16)).tensors()
    tensors = {n: t.float() if n.endswith((".A_log", ".D")) else t for n, t in tensors.items()}
    config = random_model().config
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        write_checkpoint(tmp_path / layout, tensors, config, format=layout)
        checkpoint = load_checkpoint(tmp_path / layout)
        assert same(checkpoint.tensors(), tensors)
        assert checkpoint.config.dtype == torch.bfloat16
        raw = json.loads((tmp_path / layout / "config.json").read_text())
        assert raw.get("dtype") == ("bfloat16" if layout == "transformers" else None)
        assert same(load_checkpoint(tmp_path / layout, dtype=torch.float32).tensors(), tensors)


def test_misaligned_tensors_are_usable_by_compiled_code(tmp_path, model_directory):
    """safetensors lets a writer put a float32 tensor at an address that is no multiple of four."""
    tensors = load_checkpoint(model_directory()).tensors()
    config = random_model().config
    write_checkpoint(tmp_path, tensors, config)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip(b" ")
    header += b" " * ((3 - len(header)) % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    checkpoint = load_checkpoint(tmp_path)
    assert same(checkpoint.tensors(), tensors)
    assert all(p.data_ptr() % 4 == 0 for p in checkpoint.model.parameters())


def test_tiny_is_embedded(tiny, tmp_path, monkeypatch):
    assert tiny.directory == TINY_DIRECTORY
    assert set(tiny.dtypes.values()) == {torch.float16}
    assert parameter_count(tiny.tensors()) == 3_676_928
    tokens = torch.randint(0, 4096, (1, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(tiny.model, tokens), logits(stock(TINY_DIRECTORY, dtype=torch.float32), tokens))
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("tiny").directory == TINY_DIRECTORY  # the folder is "./tiny"
    with pytest.raises(CheckpointError, match="config"):
        load_checkpoint("./tiny")


def test_dtype_of_older_transformers_and_unknown_keys(tmp_path, model_directory):
    directory = shutil.copytree(model_directory("transformers", torch.float16), tmp_path / "m")
    change_json(directory / "config.json", dtype=None, torch_dtype="float16", training={"steps": 3000})
    checkpoint = load_checkpoint(directory)
    out = write(tmp_path / "out", checkpoint)
    raw = json.loads((out / "config.json").read_text())
    assert raw["dtype"] == "float16"
    assert "torch_dtype" not in raw
    assert raw["training"] == {"steps": 3000}
    assert stock(out).config.training == {"steps": 3000}
    assert stock(out).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float16", "torch.float32", "int8", 7])
def test_the_tensors_say_their_dtype_not_the_config(tmp_path, model_directory, dtype):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    change_json(directory / "config.json", dtype=dtype)
    checkpoint = load_checkpoint(directory)
    assert set(checkpoint.dtypes.values()) == {checkpoint.config.dtype} == {torch.float32}
    assert stock(write(tmp_path / "out", checkpoint)).dtype == torch.float32


def test_generation_defaults_are_read(tmp_path, model_directory):
    directory = shutil.copytree(model_directory(), tmp_path / "m")
    (directory / "generation_config.json").write_text('{"do_sample": true, "top_k": 7, "eos_token_id": 5}')
    theirs = stock(directory).generation_config
    assert load_checkpoint(directory).model.generation_config.to_dict() == theirs.to_dict()


def test_progress_is_told(model_directory):
    told = []
    load_checkpoint(model_directory(sharded=True), progress=lambda *step: told.append(step))
    done, total = [step[1] for step in told], told[0][2]
    assert total > 2
    assert done == list(range(total + 1))
