"""`--quantize` from options to artefact: alone, after pruning, for every family, from a recipe; what is refused."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssmc.compressor import compress, read_recipe
from ssmc.compressor.distillation.run import Lesson, distil_artefact
from ssmc.compressor.options.config import configure
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.quantized import FILE, read_quantized
from tests.pipeline.test_compress import contents
from tests.support.families import FAMILIES, short, with_tokenizer
from tests.support.models import random_mamba2, random_model
from tests.support.pruning import prune_layers

WIDE = {"hidden_size": 32, "vocab_size": 4096, "tie_word_embeddings": False}
MAKERS = {
    "mamba": random_model,
    "mamba2": lambda **sizes: random_mamba2(num_heads=16, **sizes),
    "jamba": FAMILIES["jamba"],  # experts
    "falcon_h1": FAMILIES["falcon_h1"],  # attention beside the mixer, and multipliers
    "zamba2": lambda **sizes: FAMILIES["zamba2"](n_mamba_heads=8, **sizes),  # shared blocks
}
QUICK = {"quantize": "w4", "group_size": 32}


def saved(model, directory):
    model.save_pretrained(directory)
    return with_tokenizer(directory)


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_holds_the_numbers_of_its_codes(tmp_path, name):
    source = saved(MAKERS[name](**WIDE), tmp_path / name)
    result = compress(source, out=tmp_path / "out", quantize_embedding="w8", **QUICK, **short(source))
    masked, dense = (load_checkpoint(p, dtype=torch.float32).model.state_dict() for p in (tmp_path / "out", source))
    codes = read_quantized(tmp_path / "out")
    assert {name.split(".")[-2] for name in codes} >= {"in_proj", "out_proj", "lm_head"}
    for tensor, weight in masked.items():
        if tensor not in codes:
            assert torch.equal(weight, dense[tensor]), f"{tensor} should stay"
            continue
        assert torch.equal(weight, codes[tensor].weight())
        assert codes[tensor].shape.bits == (8 if "layers" not in tensor else 4)
        assert not torch.equal(weight, dense[tensor])
    listed = [entry["tensor"] for layer in result.manifest["layers"] for entry in layer["quantized"]]
    outside = [entry["tensor"] for entry in result.manifest["quantized"]["outside"]]
    stay = [entry for layer in result.manifest["layers"] for entry in layer["quantized"] if "left_out" in entry]
    assert all("no groups of 16" in entry["left_out"] for entry in stay)
    assert sorted([*listed, *outside]) == sorted([*codes, *(entry["tensor"] for entry in stay)])
    if not load_checkpoint(source).architecture.capabilities.uniform and name != "zamba2":
        assert any("attn" in tensor or "mlp" in tensor or "mixer.q_proj" in tensor for tensor in codes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Mamba with a tokenizer, its tensors in float16."""
    return saved(random_model(torch.float16, **WIDE), tmp_path_factory.mktemp("small") / "model")


def test_pruned_channels_and_states_are_no_part_of_the_groups(small, tmp_path):
    options = {"pattern": "column+channel", "sparsity": 0.5, "round_channels": 32, **QUICK, **short(small)}
    compress(small, out=tmp_path / "out", **options)
    codes = read_quantized(tmp_path / "out")
    assert codes["backbone.layers.0.mixer.out_proj.weight"].codes.shape == (32, 32)
    export(tmp_path / "out")
    cut = load_file(tmp_path / "out" / "safetensors" / "model.safetensors")
    for name, weight in codes.items():
        rows = cut[name].shape[0]  # those of pruned states are cut here and silent there
        wanted = weight.weight().half()
        assert torch.equal(wanted.float(), weight.weight())
        wanted = wanted if len(wanted) == rows else wanted[wanted.ne(0).any(1)]
        assert torch.equal(cut[name], wanted)
    assert contents(tmp_path / "out")
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    compress(**recipe, out=tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1"])
def test_directions_of_the_stream_that_went_are_no_part_of_the_groups(name, method, tmp_path):
    source = saved(MAKERS[name](**WIDE), tmp_path / name)
    options = {"quantize_method": method, "quantize_embedding": "w8", "group_size": 16, "quantize": "w4"}
    if method == "rtn":
        options |= {"score": "magnitude", "repair": False}
    else:
        options |= short(source) | {"nsamples": 16}  # enough for in_proj to be fitted
    compress(source, out=tmp_path / "out", pattern="width", sparsity=0.5, **options)
    codes = read_quantized(tmp_path / "out")
    prefix = architecture_for(name).block_prefix(0)
    in_proj = next(code for tensor, code in codes.items() if tensor.startswith(prefix) and "in_proj" in tensor)
    assert in_proj.codes.shape[1] == codes["lm_head.weight"].codes.shape[1] == 16
    for options in ({"format": "compressed-tensors"}, {"format": "onnx", "quantize": "codes"}):
        assert export(tmp_path / "out", **options).comparison.max_difference < 1e-3


def test_zeros_of_two_of_four_stay(small, tmp_path):
    compress(small, out=tmp_path / "out", pattern="2:4", **QUICK, **short(small))
    weight = read_quantized(tmp_path / "out")["backbone.layers.1.mixer.in_proj.weight"].weight()
    assert (weight.view(-1, 4) == 0).sum(1).ge(2).all()


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_awq_and_rounding_leave_the_same_kind_of_artefact(small, tmp_path, method):
    text = {} if method == "rtn" else short(small)
    result = compress(small, out=tmp_path / "out", quantize_method=method, quantize="w8", **text)
    assert (result.manifest["calibration"] is None) == (method == "rtn")
    dense, masked = (load_checkpoint(p, dtype=torch.float32).model for p in (small, tmp_path / "out"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (model(tokens, use_cache=False).logits.log_softmax(-1) for model in (dense, masked))
    assert (after - before).abs().mean() < 0.1  # an inverse scale that was forgotten moves them by more


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "w3"}, "'w8' or 'w4'"),
        ({"quantize": "w4", "group_size": 48}, "power of two"),
        ({"quantize": "w4", "quantize_modules": "conv1d"}, "some of in_proj"),
        ({"quantize": "w4", "distill": 10}, "istill does not go with quantize"),
        ({"quantize": "w4", "refine": 10}, "prunes nothing"),
        ({"symmetric": False}, "goes with quantize"),
        ({"pattern": "none"}, "goes with quantize"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        configure(model="tiny", **options)


def test_a_quantised_artefact_is_not_distilled(small, tmp_path):
    compress(small, out=tmp_path / "out", quantize_method="rtn", quantize="w4")
    with pytest.raises(UsageError, match="codes of 4 bits"):
        distil_artefact(tmp_path / "out", Lesson(1))


@torch.no_grad()
def test_in_proj_makes_up_for_what_the_stream_lost():
    """W (I + M) on what the quantised model reads, M by numpy's least squares, is what is quantised."""
    model = random_model(**WIDE)
    dense = copy.deepcopy(model)
    architecture = architecture_for("mamba")
    tokens = torch.randint(0, 60, (24, 48), generator=torch.Generator().manual_seed(1))
    config = configure(model="x", pattern="channel", sparsity=0.5, quantize="w8", group_size=32, round_channels=32)
    layers = prune_layers(use_fast_scan(model), architecture, tokens, config, {})

    def read(network):
        block = network.backbone.layers[0]
        hidden = torch.cat([architecture.run(block, network.backbone.embeddings(sample[None])) for sample in tokens])
        return network.backbone.layers[1].norm(hidden).flatten(0, 1).double().numpy()

    x, wanted = read(model), read(use_fast_scan(dense))
    change = np.linalg.lstsq(x, wanted - x, rcond=None)[0].T  # M
    before, after = (network.backbone.layers[1].mixer.in_proj.weight.double().numpy() for network in (dense, model))
    kept = [*layers[1].channels_kept, *(64 + j for j in layers[1].channels_kept)]
    corrected = before @ (np.eye(len(change)) + change)
    assert np.linalg.norm((corrected - before)[kept]) > 0.05 * np.linalg.norm(before[kept])
    assert np.linalg.norm((corrected - after)[kept]) < 0.02 * np.linalg.norm(before[kept])
