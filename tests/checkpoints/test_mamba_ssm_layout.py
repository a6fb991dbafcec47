"""mamba_ssm's layout, judged by a plain reading of its files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.models.families import STATE
from tests.support.checkpoints import DTYPES, LAYOUTS, same, write, written
from tests.support.models import (
    LAYERS,
    logits,
    random_model,
    random_tokens,
    save_mamba_ssm,
    save_transformers,
)


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
