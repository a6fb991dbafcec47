"""The codes of `ssmc compress --quantize` in the formats of other software: the same numbers, read by their code."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssmc.cli.memory import footprints_of
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.gguf.codes import blocks
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.outline import read_outline
from ssmc.runtime.quantized import FILE, GridShape, Quantized, read_quantized
from tests.pipeline.test_quantized import WIDE, saved
from tests.support.families import FAMILIES, short
from tests.support.models import random_model

RTN = {"quantize": "w4", "quantize_method": "rtn", "group_size": 32}
TOKENS = torch.arange(7, 47)[None]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A function that makes quantised artefacts of one small random Mamba in float16, each once."""
    folder, made = tmp_path_factory.mktemp("codes"), {}
    source = saved(random_model(torch.float16, num_hidden_layers=2, **WIDE), folder / "model")

    def make(**options):
        key = str(options)
        if key not in made:
            made[key] = folder / f"out{len(made)}"
            text = short(source) if options.get("quantize_method") == "gptq" else {}
            compress(source, out=made[key], **{**RTN, **options, **text})
        return made[key]

    return make


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"quantize_method": "gptq"}, {"symmetric": False, "quantize": "w8"}],
    ids=["w4", "w4 with scales below zero", "w8 with zero points"],
)
def test_transformers_unpacks_the_very_numbers(artefact, options):
    out = artefact(**options)
    result = export(out, format="compressed-tensors")
    assert result.comparison.max_difference <= result.comparison.tolerance
    assert torch.equal(logits(result.directory), logits(out))
    stored = load_file(result.directory / "model.safetensors")
    packed = stored["backbone.layers.0.mixer.in_proj.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.shape[1] * 32 == 32 * (8 if "symmetric" in options else 4)
    scales = stored["backbone.layers.0.mixer.in_proj.weight_scale"]
    assert bool((scales < 0).any()) == ("quantize_method" in options)
    assert "backbone.layers.0.mixer.in_proj.weight" not in stored
    assert not (result.directory / FILE).exists()


@pytest.mark.parametrize("options", [{}, {"symmetric": False, "quantize": "w8"}], ids=["w4", "w8 with zero points"])
def test_packed_codes_run_with_the_very_numbers(artefact, options):
    out = artefact(**options)
    packed = export(out, format="compressed-tensors", out=out / "packed").directory
    ours, masked = load_checkpoint(packed, codes=True).tensors(), load_checkpoint(out).tensors()
    assert ours.keys() == masked.keys()
    assert all(
        torch.equal(tensor, masked[name]) and tensor.dtype == masked[name].dtype for name, tensor in ours.items()
    )
    with pytest.raises(CheckpointError, match="hold codes, not weights that could be pruned"):
        load_checkpoint(packed)


def test_packed_codes_that_lost_a_part_are_refused(artefact, tmp_path):
    packed = export(artefact(), format="compressed-tensors", out=tmp_path / "packed").directory
    stored = load_file(packed / "model.safetensors")
    name = next(name for name in stored if name.endswith("weight_scale"))
    save_file({k: v for k, v in stored.items() if k != name}, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no {name}"):
        load_checkpoint(packed, codes=True)
    save_file(stored | {name: stored[name][:-1].contiguous()}, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_checkpoint(packed, codes=True)


def test_a_format_without_codes_says_where_they_are(artefact):
    out = artefact()
    (remark,) = (r for r in export(out, format="safetensors", out=out / "plain").remarks if "codes" in r)
    assert "ordinary numbers" in remark
    assert "--format compressed-tensors" in remark
    written = export(out, format="onnx", quantize="codes", out=out / "graph")
    assert not any("ordinary numbers" in remark for remark in written.remarks)


@pytest.mark.parametrize(("modules", "runs"), [("in_proj,out_proj", False), ("out_proj", True)])
def test_maps_that_vllm_has_no_kernel_for_are_named(tmp_path, modules, runs):
    """vLLM 0.32: "Output size (908) not supported by CPUWNA16, supported sizes are multiples of 32"."""
    compress("tiny-mamba2", out=tmp_path / "out", **RTN, quantize_modules=modules)
    vllm = export(tmp_path / "out", format="compressed-tensors").runs_where[1]
    assert (vllm.runs, "in_proj has 908" in vllm.remark) == (runs, not runs)


def test_memory_counts_the_codes(artefact):
    out = artefact()
    packed = export(out, format="compressed-tensors", out=out / "counted")
    found = footprints_of(out, read_outline(out), 64)
    assert found["in codes"].weights == found["with int8 states"].weights < found["dense"].weights
    scales = sum(t.nbytes for n, t in load_file(packed.directory / "model.safetensors").items() if "_shape" in n)
    assert found["in codes"].weights == packed.weight_bytes[1] - scales


def test_maps_of_a_hybrid_are_unpacked_too(tmp_path):
    compress(saved(FAMILIES["falcon_h1"](**WIDE), tmp_path / "model"), out=tmp_path / "out", **RTN)
    directory = export(tmp_path / "out", format="compressed-tensors").directory
    assert torch.equal(logits(directory), logits(tmp_path / "out"))
    assert any("self_attn.q_proj.weight_packed" in name for name in load_file(directory / "model.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_embedding": "w8", "quantize_method": "gptq"},
        {"symmetric": False, "quantize_embedding": "w4"},
    ],
)
def test_onnxruntime_multiplies_with_the_codes(artefact, options):
    out = artefact(**options)
    result = export(out, format="onnx", quantize="codes")  # proven by running it, in every way
    assert not result.details.rounding
    assert result.weight_bytes[1] < 4 * result.parameters[1] / 3  # of float32
    if "symmetric" not in options:
        rounded = export(out, format="onnx", quantize="codes", activations="int8", out=out / "rounded")
        assert max(way.max_difference for way in rounded.details.rounding) > result.comparison.max_difference


def test_llama_cpp_holds_the_same_numbers(artefact):
    out = artefact(quantize_embedding="w8", quantize_method="gptq")
    codes = read_quantized(out)
    result = export(out, format="gguf", quantize="codes")
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(result.directory / "model.gguf").tensors}
    for name, kind, source in (
        ("blk.1.ssm_out.weight", "Q4_0", "backbone.layers.1.mixer.out_proj.weight"),
        ("token_embd.weight", "Q8_0", "backbone.embeddings.weight"),
    ):
        assert file[name].tensor_type.name == kind
        found = gguf.dequantize(file[name].data, file[name].tensor_type)
        assert np.array_equal(found, codes[source].weight().numpy())
    assert file["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_group_of_sixteen_is_no_block():
    code = Quantized(GridShape(4, 16), torch.ones(2, 64, dtype=torch.int8), torch.tensor([[1.0, 2, 3, 4]] * 2))
    assert blocks(code.weight(), code.expanded_scale()) is None
    whole = dataclasses.replace(code, shape=GridShape(4, 32), scale=torch.tensor([[1.0, 2]] * 2))
    kind, data = blocks(whole.weight(), whole.expanded_scale())
    assert np.array_equal(gguf.dequantize(data, kind), whole.weight().numpy())


@pytest.mark.parametrize(
    ("compressing", "exporting", "words"),
    [
        ({"symmetric": False}, {"format": "gguf", "quantize": "codes"}, "no zero points"),
        ({}, {"format": "onnx", "quantize": "int8", "activations": "int8"}, "goes with --quantize codes"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(artefact, compressing, exporting, words):
    with pytest.raises(UsageError, match=words):
        export(artefact(**compressing), out=artefact() / "refused", **exporting)
    assert not (artefact() / "refused").exists()


def test_weights_that_were_changed_are_refused(artefact, tmp_path):
    out = artefact(quantize="w8")
    weights = load_file(out / "model.safetensors")
    weights["backbone.layers.0.mixer.out_proj.weight"][3, 5] += 0.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"out_proj\.weight, which was changed"):
        export(out, format="compressed-tensors")


def test_a_model_without_codes_is_refused(tmp_path):
    compress("tiny", out=tmp_path / "out", score="magnitude", repair=False, sparsity=0.5)
    with pytest.raises(UsageError, match="holds no codes"):
        export(tmp_path / "out", format="compressed-tensors")
