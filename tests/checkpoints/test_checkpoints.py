"""Both layouts, read and written exactly; judged by stock transformers and by a plain reading of mamba_ssm's files."""

import errno
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.errors import CheckpointError, OutputError, UsageError
from ssmc.runtime.files import new_directory
from ssmc.runtime.models.checkpoints import load_checkpoint, parameter_count, unpadded_vocab_size, write_checkpoint
from ssmc.runtime.models.families import STATE
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.models import (
    LAYERS,
    PADDED,
    VOCAB,
    logits,
    random_model,
    random_tokens,
    save_mamba_ssm,
    save_transformers,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transformers", "mamba-ssm"]
A_LOG, NORM = "backbone.layers.1.mixer.A_log", "backbone.norm_f.weight"
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def stock(directory, **options):
    """transformers' own loading, which must find nothing missing, unexpected or misshapen."""
    model, info = MambaForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def written(directory):
    """Content of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(directory, checkpoint, **options):
    directory.mkdir()
    files = write_checkpoint(directory, checkpoint.tensors(), checkpoint.config, **options)
    assert sorted(files) == sorted(directory.iterdir())
    return directory


def same(one, other):
    return (
        one.keys() == other.keys()
        and all(one[k].dtype == other[k].dtype for k in one)
        and all(torch.equal(one[k], other[k]) for k in one)
    )


# --- reading ----------------------------------------------------------------------------------------------------------


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


# --- writing transformers' layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB", 1000])
def test_stock_transformers_loads_what_is_written(tmp_path, model_directory, dtype, layout, max_shard_size):
    checkpoint = load_checkpoint(model_directory(layout, dtype))
    out = write(tmp_path / "out", checkpoint, max_shard_size=max_shard_size)
    model = stock(out)
    assert model.dtype == dtype
    assert same(model.state_dict(), checkpoint.model.state_dict())
    assert torch.equal(logits(model), logits(checkpoint.model))
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size != "5GB")
    stored = list(itertools.chain(*(safetensors.torch.load_file(shard) for shard in shards)))
    assert sorted(stored) == sorted(set(checkpoint.model.state_dict()) - {HEAD})
    assert same(load_checkpoint(out).tensors(), checkpoint.tensors())


def test_safetensors_say_their_framework(tmp_path, model_directory):
    out = write(tmp_path / "out", load_checkpoint(model_directory()))
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_d_inner_that_is_no_multiple_of_d_model(tmp_path):
    model = random_model(intermediate_size=41)
    save_transformers(model, tmp_path / "t")
    checkpoint = load_checkpoint(tmp_path / "t")
    assert checkpoint.dimensions.d_inner == 41
    out = write(tmp_path / "out", checkpoint)
    assert torch.equal(logits(stock(out)), logits(model))


# --- writing mamba_ssm's layout ---------------------------------------------------------------------------------------


def plain_forward(directory, tokens):
    """Mamba from the paper's formulas and mamba_ssm's names, in float64, one token after the other."""
    config = json.loads((directory / "config.json").read_text())
    raw = torch.load(directory / "pytorch_model.bin", weights_only=True)
    t = {name: tensor.double() for name, tensor in raw.items()}
    ssm = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": math.ceil(config["d_model"] / 16)} | config["ssm_cfg"]
    n, r, d = ssm["d_state"], ssm["dt_rank"], int(ssm["expand"] * config["d_model"])
    residual = t["backbone.embedding.weight"][tokens]  # (B, L, d_model)
    for layer in range(config["n_layer"]):
        p = {k.split(".", 3)[3]: v for k, v in t.items() if k.startswith(f"backbone.layers.{layer}.")}
        m = {k.removeprefix("mixer."): v for k, v in p.items()}
        x, z = (rms_norm(residual, p["norm.weight"]) @ m["in_proj.weight"].T).split(d, dim=-1)
        window, h, outputs = x.new_zeros(*x.shape[:1], ssm["d_conv"], d), x.new_zeros(*x.shape[:1], d, n), []
        for step in range(x.shape[1]):
            window = torch.cat([window[:, 1:], x[:, step : step + 1]], dim=1)
            u = F.silu((window * m["conv1d.weight"][:, 0].T).sum(1) + m["conv1d.bias"])
            dt, B, C = (u @ m["x_proj.weight"].T).split([r, n, n], dim=-1)
            dt = F.softplus(dt @ m["dt_proj.weight"].T + m["dt_proj.bias"])[..., None]
            h = torch.exp(-dt * m["A_log"].exp()) * h + dt * u[..., None] * B[:, None]
            outputs.append(((h * C[:, None]).sum(-1) + m["D"] * u) * F.silu(z[:, step]))
        residual = residual + torch.stack(outputs, dim=1) @ m["out_proj.weight"].T
    return rms_norm(residual, t["backbone.norm_f.weight"]) @ t["lm_head.weight"].T


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def mamba_ssm_names():
    mixer = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"]
    mixer = [f"mixer.{name}" for name in (*mixer, "dt_proj.bias", "out_proj.weight")]
    layers = [f"backbone.layers.{i}.{name}" for i in range(LAYERS) for name in ("norm.weight", *mixer)]
    return {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight", *layers}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba_ssm_files_hold_what_mamba_ssm_wants(tmp_path, model_directory, layout, dtype):
    checkpoint = load_checkpoint(model_directory(layout, dtype))
    out = write(tmp_path / "out", checkpoint, format="mamba-ssm")
    stored = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert type(stored) is dict
    assert stored.keys() == mamba_ssm_names()
    assert {t.dtype for t in stored.values()} == {dtype}
    assert stored["lm_head.weight"].data_ptr() == stored["backbone.embedding.weight"].data_ptr()


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 41}, {"state_size": 3}], ids=str)
def test_mamba_ssm_files_compute_the_same(tmp_path, changes):
    model = random_model(**changes)
    save_transformers(model, tmp_path / "t")
    out = write(tmp_path / "out", load_checkpoint(tmp_path / "t"), format="mamba-ssm")
    tokens = random_tokens()
    expected = plain_forward(out, tokens)
    assert torch.allclose(logits(model, tokens).double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_a_published_config_is_understood(tmp_path):
    """The config.json of state-spaces/mamba-130m, whose ssm_cfg is empty: every default has to be known."""
    raw = {"d_model": 48, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    raw |= {"fused_add_norm": True, "pad_vocab_size_multiple": 8}
    model = random_model(hidden_size=48, num_hidden_layers=2, vocab_size=56, state_size=16, time_step_rank=3)
    save_mamba_ssm(model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw, indent=4))
    checkpoint = load_checkpoint(tmp_path / "m")
    assert torch.equal(logits(checkpoint.model), logits(model))
    out = write(tmp_path / "out", checkpoint, format="mamba-ssm")
    assert (out / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_from_mamba_ssm_through_transformers(tmp_path, model_directory, dtype):
    """config.json to the byte, the unpadded vocabulary included, and every tensor."""
    directory = model_directory("mamba-ssm", dtype)
    through = write(tmp_path / "t", load_checkpoint(directory))
    out = write(tmp_path / "m", load_checkpoint(through), format="mamba-ssm")
    assert (out / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    before, after = (torch.load(d / "pytorch_model.bin", weights_only=True) for d in (directory, out))
    assert same(dict(before), after)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bytes_wherever_it_is_written(tmp_path, model_directory, layout, dtype):
    checkpoint = load_checkpoint(model_directory("transformers", dtype))
    one = write(tmp_path / "one", checkpoint, format=layout)
    other = write(tmp_path / "another-name", load_checkpoint(checkpoint.directory), format=layout)
    assert written(one) == written(other)
    again = write(tmp_path / "again", load_checkpoint(one), format=layout)
    assert written(again) == written(one)


@pytest.mark.parametrize(("d_model", "d_inner"), [(24, 41), (24, 48), (24, 24), (24, 23), (768, 1535), (49, 27)])
def test_expand_gives_d_inner_exactly(tmp_path, d_model, d_inner):
    config = MambaConfig(
        vocab_size=8, hidden_size=d_model, num_hidden_layers=1, intermediate_size=d_inner, state_size=2
    )
    model = MambaForCausalLM(config)
    write_checkpoint(tmp_path, model.state_dict(), config, format="mamba-ssm")
    expand = json.loads((tmp_path / "config.json").read_text())["ssm_cfg"].get("expand", 2)
    assert int(expand * d_model) == d_inner  # mamba_ssm/modules/mamba_simple.py
    assert load_checkpoint(tmp_path).dimensions.d_inner == d_inner


def test_only_what_changed_is_changed_in_the_config(tmp_path, model_directory):
    checkpoint = load_checkpoint(model_directory("mamba-ssm"))
    original = json.loads((checkpoint.directory / "config.json").read_text())
    kept = [[0, 2, 5]] * LAYERS
    tensors, config, _ = checkpoint.architecture.cut(checkpoint.tensors(), checkpoint.config, STATE, kept)
    write_checkpoint(tmp_path, tensors, config, format="mamba-ssm")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw == original | {"ssm_cfg": {"d_state": 3, "dt_rank": 5}}
    assert load_checkpoint(tmp_path).dimensions.d_state == 3


@pytest.mark.parametrize(
    ("changes", "named"), [({"layer_norm_epsilon": 1e-6}, "1e-06"), ({"hidden_act": "gelu"}, "gelu")]
)
def test_what_mamba_ssm_cannot_compute_is_not_written(tmp_path, changes, named):
    model = random_model(**changes)
    with pytest.raises(CheckpointError, match=rf"{named}.*transformers' layout"):
        write_checkpoint(tmp_path, model.state_dict(), model.config, format="mamba-ssm")
    assert list(tmp_path.iterdir()) == []


def test_biases_go_both_ways(tmp_path):
    model = random_model(use_bias=True, use_conv_bias=False)
    save_transformers(model, tmp_path / "t")
    out = write(tmp_path / "m", load_checkpoint(tmp_path / "t"), format="mamba-ssm")
    ssm_cfg = json.loads((out / "config.json").read_text())["ssm_cfg"]
    assert (ssm_cfg["bias"], ssm_cfg["conv_bias"]) == (True, False)
    assert torch.equal(logits(load_checkpoint(out).model), logits(model))


# --- writing what must not be written ---------------------------------------------------------------------------------


def test_numbers_that_overflow_are_not_written(tmp_path, model_directory):
    checkpoint = load_checkpoint(model_directory("transformers", torch.float16), dtype=torch.float32)
    with torch.no_grad():
        checkpoint.model.backbone.norm_f.weight[3] = 1e6  # fits float32, not float16
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=NORM):
            write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config, format=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    model = random_model()
    tensors = dict(model.state_dict())
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(100_000, 24)])[:PADDED]
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        files = write_checkpoint(tmp_path / layout, tensors | {HEAD: tensors[EMBEDDING]}, model.config, format=layout)
        assert sum(f.stat().st_size for f in files) < 200_000


def test_there_are_two_formats(tmp_path):
    model = random_model()
    with pytest.raises(UsageError, match=r"gguf.*transformers, mamba-ssm"):
        write_checkpoint(tmp_path, model.state_dict(), model.config, format="gguf")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small disk")
def test_a_full_disk(tmp_path):
    """On a real disk of 4 MB: neither library raises OSError by itself."""
    (tmp_path / "disk").mkdir()
    program = """
import sys, pathlib
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.errors import OutputError
from ssmc.runtime.files import new_directory
disk, tiny = pathlib.Path(sys.argv[1]), load_checkpoint("tiny")
for layout in ("transformers", "mamba-ssm"):
    try:
        with new_directory(disk / "out") as folder:
            write_checkpoint(folder, tiny.tensors(), tiny.config, format=layout)
    except OutputError as error:
        print(error)
    assert list(disk.iterdir()) == []
"""
    command = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", tmp_path / "disk", sys.executable, program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this system does not let us mount a small disk")
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 2
    assert all("no space left" in sentence and "--out" in sentence for sentence in sentences)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path, model_directory, monkeypatch):
    checkpoint = load_checkpoint(model_directory())

    def refuse(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("ssmc.runtime.models.checkpoints.transformers_format.save_file", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config)
    assert caught.value.errno == errno.EIO


# --- wrong inputs: each an error that names the culprit ---------------------------------------------------------------


def change_json(path, **values):
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


@pytest.fixture
def damage(tmp_path, model_directory):
    """A function that copies a model, lets its caller damage the tensors, and returns the directory."""

    def change(layout, edit):
        directory = shutil.copytree(model_directory(layout), tmp_path / "damaged")
        if layout == "transformers":
            tensors = safetensors.torch.load_file(directory / "model.safetensors")
            edit(tensors)
            safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
            edit(tensors)
            torch.save(tensors, directory / "pytorch_model.bin")
        return directory

    return change


def refused(source, *named):
    """Reading must fail with one or two sentences that hold all of `named`."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    message = str(caught.value)
    assert all(str(word) in message for word in named), message
    assert "\n" not in message
    assert len(message) < 500
    assert message.rstrip()[-1] == "."
    return message


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


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, model_directory):
    return shutil.copytree(model_directory(sharded=True), tmp_path / "m")


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


# --- config.json ------------------------------------------------------------------------------------------------------


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


# --- paths ------------------------------------------------------------------------------------------------------------


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
        context.setattr("ssmc.runtime.models.checkpoints.reading.safe_open", refuse)
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
