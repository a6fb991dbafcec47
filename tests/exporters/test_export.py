"""Exports: stock loaders read them, they compute what the masked model computes, and damage is noticed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MambaForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import compare, export, runs_where
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError, VerificationError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import Dimensions


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, sparsity=0.75, nsamples=2, seqlen=128)
    export(out)
    export(out, format="mamba-ssm")
    return out


@pytest.fixture
def copy(artefact, tmp_path):
    """An artefact that a test may damage."""
    shutil.copytree(artefact, tmp_path / "copy", ignore=shutil.ignore_patterns("safetensors", "mamba-ssm"))
    return tmp_path / "copy"


def test_stock_transformers_loads_it_computes_the_same_and_generates(artefact):
    tokenizer = AutoTokenizer.from_pretrained(artefact / "safetensors")
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    shrunk, info = MambaForCausalLM.from_pretrained(
        artefact / "safetensors", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    masked = MambaForCausalLM.from_pretrained(artefact, dtype=torch.float32)
    assert shrunk.config.state_size == 4
    assert shrunk.backbone.layers[0].mixer.A_log.shape == (512, 4)
    assert shrunk.backbone.layers[0].mixer.x_proj.weight.shape == (16 + 2 * 4, 512)
    with torch.no_grad():
        torch.testing.assert_close(shrunk(prompt).logits, masked(prompt).logits, rtol=1e-4, atol=1e-4)
    text = tokenizer.decode(shrunk.generate(prompt, max_new_tokens=20, do_sample=False)[0])
    assert text == tokenizer.decode(masked.generate(prompt, max_new_tokens=20, do_sample=False)[0])
    assert len(text.split()) > 10


def test_the_mamba_ssm_layout_is_what_its_loader_expects(artefact):
    """Read as mamba_ssm does: d_state out of ssm_cfg, a plain state dict with the head in it."""
    config = json.loads((artefact / "mamba-ssm" / "config.json").read_text())
    assert config["ssm_cfg"]["d_state"] == 4
    assert "model_type" not in config
    state = torch.load(artefact / "mamba-ssm" / "pytorch_model.bin", weights_only=True)
    assert state["backbone.layers.5.mixer.A_log"].shape == (512, 4)
    assert torch.equal(state["lm_head.weight"], state["backbone.embedding.weight"])
    stock = load_file(artefact / "safetensors" / "model.safetensors")
    for name, tensor in stock.items():
        assert torch.equal(state[name.replace("embeddings", "embedding")], tensor), name


def test_a_dense_model_changes_to_the_mamba_ssm_layout(tmp_path):
    export("tiny", format="mamba-ssm", out=tmp_path / "out")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    dense = load_checkpoint("tiny").model.state_dict()
    assert {name.replace("embeddings", "embedding") for name in dense} == state.keys()
    for name, tensor in dense.items():
        assert torch.equal(state[name.replace("embeddings", "embedding")], tensor), name


def test_cuts_and_sizes_are_those_of_the_files(copy):
    result = export(copy)
    assert {c.name.rpartition("mixer.")[2]: (c.before, c.after) for c in result.cuts} == {
        "A_log": ((512, 16), (512, 4)),
        "x_proj.weight": ((48, 512), (24, 512)),
    }
    assert len(result.cuts) == 12
    stored = load_file(copy / "safetensors" / "model.safetensors")
    assert result.parameters[1] == sum(t.numel() for t in stored.values())
    assert result.parameters[0] - result.parameters[1] == 6 * (512 * 12 + 24 * 512)
    assert result.comparison.max_difference <= result.comparison.tolerance
    assert result.comparison.real_text
    provenance = json.loads((copy / "safetensors" / "config.json").read_text())["ssmc"]
    assert provenance["pattern"] == "column"


def test_kept_states_carry_their_own_numbers(artefact):
    """Which rows and columns stay is checked one by one against the masked tensors."""
    masked, shrunk = load_file(artefact / "model.safetensors"), load_file(artefact / "safetensors/model.safetensors")
    for i, layer in enumerate(json.loads((artefact / "ssmc.json").read_text())["layers"]):
        prefix = f"backbone.layers.{i}.mixer."
        for position, state in enumerate(layer["kept"]):
            A_log, x_proj = prefix + "A_log", prefix + "x_proj.weight"
            assert torch.equal(shrunk[A_log][:, position], masked[A_log][:, state])
            assert torch.equal(shrunk[x_proj][16 + position], masked[x_proj][16 + state])
            assert torch.equal(shrunk[x_proj][20 + position], masked[x_proj][32 + state])


def test_removed_blocks_are_cut(tmp_path):
    out = tmp_path / "out"
    result = compress("tiny", out=out, pattern="layer", sparsity=0.34, repair=False, nsamples=2, seqlen=128)
    gone = {removal.layer for removal in result.removals}
    assert len(gone) == 2
    export(out)
    shrunk = MambaForCausalLM.from_pretrained(out / "safetensors", dtype=torch.float32)
    assert shrunk.config.num_hidden_layers == 4
    dense = load_checkpoint("tiny", dtype=torch.float32).model
    stay = [block for i, block in enumerate(dense.backbone.layers) if i not in gone]
    dense.backbone.layers = torch.nn.ModuleList(stay)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(shrunk(tokens).logits, dense(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["safetensors", "mamba-ssm"])
def test_blocks_and_states_go_together(tmp_path, format):
    out = tmp_path / "out"
    result = compress(
        "tiny", out=out, pattern="layer+column", sparsity=0.34, score="similarity", nsamples=2, seqlen=128
    )
    gone = {removal.layer for removal in result.removals}
    cuts = {cut.name: (cut.before, cut.after) for cut in export(out, format=format).cuts}
    for layer in range(6):
        A_log = f"backbone.layers.{layer}.mixer.A_log"
        assert cuts[A_log] == ((512, 16), () if layer in gone else (512, 11))
    written = load_checkpoint(out / format, dtype=torch.float32)
    assert (written.dimensions.n_layer, written.dimensions.d_state) == (4, 11)
    masked = MambaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(written.model(tokens).logits, masked(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_pattern_that_makes_nothing_smaller_is_exported_as_it_is(tmp_path):
    compress("tiny", out=tmp_path / "out", pattern="unstructured", score="magnitude")
    result = export(tmp_path / "out")
    assert result.cuts == ()
    assert result.parameters[0] == result.parameters[1]
    MambaForCausalLM.from_pretrained(tmp_path / "out" / "safetensors")


def test_silent_ssms_keep_their_shape_and_are_asked_for(tmp_path):
    out = tmp_path / "out"
    result = compress("tiny", out=out, pattern="ssm-module", score="random", sparsity=0.34)
    exported = export(out)
    assert exported.cuts == ()
    stock = MambaForCausalLM.from_pretrained(exported.directory, dtype=torch.float32)
    masked = load_checkpoint(out, dtype=torch.float32).model
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, masked(tokens).logits, rtol=1e-4, atol=1e-4)
    tensors = load_file(out / "model.safetensors")
    tensors[f"backbone.layers.{result.removals[0].layer}.mixer.x_proj.weight"][16:] = 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not silent although the manifest calls it removed"):
        export(out, force=True)


def test_weights_changed_after_compressing_are_noticed(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "backbone.layers.2.mixer.x_proj.weight"
    dropped = next(k for k in range(16) if not tensors[name][16 + k].any())
    tensors[name][16 + dropped, 0] = 0.5
    tensors[name][32 + dropped, 0] = 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Layer 2 .* still uses states"):
        export(copy)
    assert not (copy / "safetensors").exists()


def test_a_manifest_of_another_model_is_noticed(copy):
    manifest = json.loads((copy / "ssmc.json").read_text())
    manifest["layers"].pop()
    (copy / "ssmc.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="5 layers, its model has 6"):
        export(copy)


@torch.no_grad()
def test_a_wrong_export_does_not_pass_the_comparison(artefact):
    """The proof must be able to fail: one weight off by a little, one state out of order."""
    masked, wrong = (load_checkpoint(p, dtype=torch.float32).model for p in (artefact, artefact / "safetensors"))
    tokens = torch.arange(64).view(2, 32)
    assert compare(masked, wrong, tokens, real_text=False).max_difference < 1e-3
    wrong.backbone.layers[3].mixer.A_log[:, [0, 1]] = wrong.backbone.layers[3].mixer.A_log[:, [1, 0]]
    with pytest.raises(VerificationError, match="nothing was written"):
        compare(masked, wrong, tokens, real_text=False)


def test_refusals(copy, tmp_path):
    with pytest.raises(UsageError, match=r"no export format 'h5'.*safetensors"):
        export(copy, format="h5")
    with pytest.raises(UsageError, match=r"no compressed model.*ssmc compress"):
        export(tmp_path)
    export(copy)
    with pytest.raises(OutputError, match="--force"):
        export(copy)
    export(copy, force=True)
    with pytest.raises(UsageError, match="is an export already"):
        export(copy / "safetensors")


def test_the_same_export_twice_gives_the_same_bytes(copy):
    for format in ("safetensors", "mamba-ssm"):
        first, second = (
            export(copy, format=format, out=copy / name).directory for name in (f"{format}1", f"{format}2")
        )
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def table(d_state, d_inner=1536):
    sizes = Dimensions(
        n_layer=24, d_model=768, d_inner=d_inner, d_state=d_state, dt_rank=48, d_conv=4, vocab_size=50280
    )
    return {row.name: row for row in runs_where(sizes, 16, "mamba")}


def test_runs_where_knows_each_consumers_limits():
    assert table(16)["llama.cpp, CUDA"].runs
    assert not table(8)["llama.cpp, CUDA"].runs
    assert table(8)["transformers"].runs
    assert "no gain" in table(12)["mamba_ssm, decode (Triton)"].remark
    assert "gains" in table(5)["mamba_ssm, decode (Triton)"].remark
    assert "padded to 8" in table(5)["mamba_ssm, decode (Triton)"].remark
    assert not table(8, d_inner=1024)["llama.cpp, CPU"].runs
