"""Patterns together, from `compress` to exports that stock loaders read: every combination, in both formats."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaForCausalLM

from ssmc.compressor import compress, read_recipe
from ssmc.exporters import export, shrink
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import read_compressed
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.pipeline.test_compress import contents

QUICK = {"nsamples": 2, "seqlen": 128}
PATTERNS = ("channel", "layer", "column+channel", "layer+channel", "layer+column+channel")
SPARSITY = {"layer": 0.34, "column": 0.75, "channel": 0.25}
FORMATS = ("safetensors", "mamba-ssm")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A function that compresses `tiny` by a pattern and exports it in both formats, once."""
    made = {}

    def make(pattern):
        if pattern not in made:
            out = made[pattern] = tmp_path_factory.mktemp("combined") / "out"
            sparsity = {part: SPARSITY[part] for part in pattern.split("+")}
            score = {"layer": "similarity"} if "layer" in pattern else None
            compress("tiny", out=out, pattern=pattern, sparsity=sparsity, score=score, **QUICK)
            for format in FORMATS:
                export(out, format=format)
        return made[pattern]

    return make


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stock_transformers_loads_what_the_masked_model_computes(artefacts, pattern):
    out = artefacts(pattern)
    stock, info = MambaForCausalLM.from_pretrained(out / "safetensors", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert stock.config.num_hidden_layers == (4 if "layer" in pattern else 6)
    assert stock.config.intermediate_size == (384 if "channel" in pattern else 512)
    assert stock.config.state_size == (4 if "column" in pattern else 16)
    masked = MambaForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert masked.config.intermediate_size == 512
    tokens = torch.arange(7, 87).view(2, 40)
    with torch.no_grad():
        expected = masked(tokens, use_cache=False).logits
        torch.testing.assert_close(stock(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mamba_ssm_layout_says_the_same(artefacts, pattern):
    """Its loader computes d_inner as int(expand * d_model) and takes a plain state dict."""
    folder = artefacts(pattern) / "mamba-ssm"
    config = json.loads((folder / "config.json").read_text())
    assert int(config["ssm_cfg"].get("expand", 2) * config["d_model"]) == (384 if "channel" in pattern else 512)
    assert config["n_layer"] == (4 if "layer" in pattern else 6)
    assert config["ssm_cfg"].get("d_state", 16) == (4 if "column" in pattern else 16)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name, tensor in load_file(folder.parent / "safetensors" / "model.safetensors").items():
        assert torch.equal(state[name.replace("embeddings", "embedding")], tensor), name
    assert load_checkpoint(folder).dimensions == load_checkpoint(folder.parent / "safetensors").dimensions


def test_kept_channels_carry_their_own_numbers(artefacts):
    """Which rows and columns stay is checked one by one against the masked tensors, the new numbers of blocks too."""
    out = artefacts("layer+column+channel")
    masked, shrunk = load_file(out / "model.safetensors"), load_file(out / "safetensors" / "model.safetensors")
    manifest = json.loads((out / "ssmc.json").read_text())
    gone = {removal["layer"] for removal in manifest["removed"]}
    stay = [layer for layer in range(6) if layer not in gone]
    assert len(stay) == 4
    for new, old in enumerate(stay):
        channels, states = manifest["layers"][old]["kept_channels"], manifest["layers"][old]["kept"]
        x_rows = [*range(16), *(16 + n for n in states), *(32 + n for n in states)]
        for name, index in (
            ("in_proj.weight", ([*channels, *(512 + d for d in channels)],)),
            ("conv1d.weight", (channels,)),
            ("conv1d.bias", (channels,)),
            ("x_proj.weight", (x_rows, channels)),
            ("dt_proj.weight", (channels,)),
            ("dt_proj.bias", (channels,)),
            ("A_log", (channels, states)),
            ("D", (channels,)),
            ("out_proj.weight", (range(256), channels)),
        ):
            expected = masked[f"backbone.layers.{old}.mixer.{name}"]
            for axis, rows in enumerate(index):
                expected = expected.index_select(axis, torch.tensor(list(rows)))
            assert torch.equal(shrunk[f"backbone.layers.{new}.mixer.{name}"], expected), name


@pytest.mark.parametrize("pattern", ["column+channel", "layer+channel"])
def test_the_recipe_repeats_a_combined_run_byte_for_byte(artefacts, tmp_path, pattern):
    out = artefacts(pattern)
    compress(**read_recipe(out / "recipe.yaml"), out=tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")
    export(tmp_path / "again")
    assert contents(out / "safetensors") == contents(tmp_path / "again" / "safetensors")


def test_layers_of_different_width_are_filled_up_for_stock_loaders(tmp_path):
    out = tmp_path / "out"
    widths, states = (512, 384, 128, 300, 7, 256), (4, 8, 2, 1, 8, 3)
    options = {"pattern": "column+channel", "widths": list(widths), "states": ",".join(map(str, states))}
    result = compress("tiny", out=out, score="magnitude", repair=False, **options)
    assert any("numbers of their own" in note for note in result.notes)
    export(out)
    stock = MambaForCausalLM.from_pretrained(out / "safetensors", dtype=torch.float32)
    assert (stock.config.intermediate_size, stock.config.state_size) == (512, 8)
    masked = load_checkpoint(out, dtype=torch.float32)
    manifest = read_compressed(out)
    uneven = shrink(masked, manifest, uneven=True)
    for layer in range(6):
        shape = uneven.tensors[f"backbone.layers.{layer}.mixer.A_log"].shape
        assert tuple(shape) == (widths[layer], states[layer])
        padded = stock.backbone.layers[layer].mixer
        alive = padded.out_proj.weight.any(0)
        assert int(alive.sum()) == widths[layer]
        small = uneven.tensors[f"backbone.layers.{layer}.mixer.out_proj.weight"]
        torch.testing.assert_close(padded.out_proj.weight[:, alive].detach(), small.float())


def test_a_channel_that_speaks_again_is_noticed(artefacts, tmp_path):
    compress("tiny", out=tmp_path / "out", pattern="channel", score="magnitude", repair=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    manifest = json.loads((tmp_path / "out" / "ssmc.json").read_text())
    dropped = next(d for d in range(512) if d not in manifest["layers"][2]["kept_channels"])
    tensors["backbone.layers.2.mixer.out_proj.weight"][5, dropped] = 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Layer 2 .* still uses channels"):
        export(tmp_path / "out")
    assert not (tmp_path / "out" / "safetensors").exists()


def test_a_width_the_model_does_not_have_is_refused_before_any_work(tmp_path):
    for options, words in (
        ({"widths": [384] * 5}, "5 layers, the model has 6"),
        ({"sparsity": 0.01}, r"removes none.*smaller round_channels"),
        ({"widths": [513] + [384] * 5}, "513 in a layer that has 512"),
    ):
        with pytest.raises(UsageError, match=words):
            compress("tiny", out=tmp_path / "out", pattern="channel", **options)
    assert not (tmp_path / "out").exists()
