"""`ssmc export --format gguf`: what is in the file, and that llama.cpp computes the model."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.gguf import layouts
from ssmc.exporters.gguf.write import FILE, read_tensors
from ssmc.runtime.errors import UsageError, VerificationError
from ssmc.runtime.manifest import read_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.llama_cpp import LlamaCpp, is_installed
from tests.support import vocabularies
from tests.support.families import bamba, falcon_h1, falcon_mamba, granite, jamba, nemotron_h
from tests.support.models import random_mamba2, random_model

SIZES = {"vocab_size": 392, "eos_token_id": 0}
llama_cpp = pytest.mark.skipif(not is_installed(), reason="llama.cpp (xllamacpp) is not installed")
LAYERS = ["linear_attention", "mlp", "full_attention", "linear_attention"]
MODELS = {
    "mamba": lambda: random_model(**SIZES),
    "mamba, head of its own": lambda: random_model(tie_word_embeddings=False, use_conv_bias=False, **SIZES),
    "mamba2": lambda: random_mamba2(**SIZES),
    "falcon_mamba": lambda: falcon_mamba(layer_norm_epsilon=1e-2, mixer_rms_eps=1e-3, **SIZES),
    "jamba": lambda: jamba(**SIZES),
    "granite": lambda: granite(**SIZES),
    "granite, no positions, no experts": lambda: granite(
        position_embedding_type="nope", num_local_experts=0, num_experts_per_tok=0, **SIZES
    ),
    "falcon_h1": lambda: falcon_h1(**SIZES),
    "falcon_h1, gated norm": lambda: falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=False, **SIZES),
    "nemotron_h": lambda: nemotron_h(layers_block_type=LAYERS, time_step_min=1e-9, **SIZES),
    "nemotron_h, experts": lambda: nemotron_h(
        layers_block_type=["linear_attention", "moe", "full_attention"], time_step_min=1e-9, **SIZES
    ),
    "bamba": lambda: bamba(hidden_size=32, mamba_n_heads=8, **SIZES),
}


@torch.no_grad()
def log_probs(model, tokens):
    """Of stock transformers, (L, V)."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1).numpy()


def tokens_of(length=40, seed=5):
    return torch.randint(0, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A compressed model, stored in float16, and its files: float32 in gguf/, 8 bits in q8/."""
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, sparsity=0.75, nsamples=2, seqlen=128)
    export(out, format="gguf")
    export(out, format="gguf", quantize="q8_0", out=out / "q8")
    return out


@llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_stock_transformers_computes(tmp_path, name):
    """At every prompt length, whole prompts and token by token, of dense models of every family."""
    folder = vocabularies.save(MODELS[name](), tmp_path / "model")
    export(folder, format="gguf", out=tmp_path / "out")
    tokens = tokens_of()
    wanted = log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)
    with LlamaCpp(tmp_path / "out" / FILE) as llama:
        for length in (1, 2, 17, 40):
            found = llama.log_probs(tokens[:length], 392)
            np.testing.assert_allclose(found, wanted[length - 1], rtol=0, atol=1e-4)
        values, likeliest = llama.score(tokens)
    right = wanted[np.arange(39), tokens[1:]]
    np.testing.assert_allclose(values, right, rtol=0, atol=1e-4)
    assert likeliest == [bool(row.argmax() == token) for row, token in zip(wanted, tokens[1:], strict=False)]


@llama_cpp
def test_a_pruned_model(artefact):
    masked = MambaForCausalLM.from_pretrained(artefact, dtype=torch.float32)
    tokens = tokens_of(60)
    with LlamaCpp(artefact / "gguf" / FILE) as llama:
        found = llama.log_probs(tokens, 4096)
    np.testing.assert_allclose(found, log_probs(masked, tokens)[-1], rtol=0, atol=1e-4)
    manifest = read_manifest(artefact / "gguf")
    assert manifest.dimensions["d_state"] == 4
    assert "xllamacpp" in manifest.about["gguf"]["run_by"]
    compared = manifest.comparison
    assert 0 < compared["max_difference"] <= compared["tolerance"] < 1e-3
    assert [way["name"] for way in compared["ways"]] == ["whole prompts", "64 decode steps"]


def test_keys_and_tensors(artefact):
    """A is made in float32 although the checkpoint is in float16; names and shapes are those of llama.cpp."""
    reader = gguf.GGUFReader(artefact / "gguf" / FILE)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "mamba"
    assert [keys[f"mamba.ssm.{k}"] for k in ("inner_size", "state_size", "time_step_rank")] == [512, 4, 16]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(keys["tokenizer.ggml.tokens"]) == 4096
    stored = read_tensors(artefact / "gguf" / FILE)
    exported = load_checkpoint(export(artefact, out=artefact / "plain", force=True).directory).tensors()
    A_log = exported["backbone.layers.3.mixer.A_log"]
    assert A_log.dtype == torch.float16
    np.testing.assert_array_equal(stored["blk.3.ssm_a"], -torch.exp(A_log.float()).numpy())
    conv = exported["backbone.layers.3.mixer.conv1d.weight"]
    np.testing.assert_array_equal(stored["blk.3.ssm_conv1d.weight"], conv[:, 0].float().numpy())
    assert "output.weight" not in stored  # tied
    assert len(stored) == 2 + 6 * 10


def test_quantised(artefact):
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(artefact / "q8" / FILE).tensors}
    large = {name for name, kind in kinds.items() if kind == "Q8_0"}
    assert {name.split(".")[-2] for name in large} == {"token_embd", "ssm_in", "ssm_out", "ssm_x"}
    assert {kinds[name] for name in kinds.keys() - large} == {"F32"}
    size = {name: (artefact / name / FILE).stat().st_size for name in ("gguf", "q8")}
    assert size["q8"] < 0.32 * size["gguf"]
    about = read_manifest(artefact / "q8").about["gguf"]
    assert about["quantize"] == "q8_0"
    if is_installed():
        assert 1e-3 < about["rounding"] < 1
        assert about["perplexity"]["tokens"] == 4 * 255
        assert abs(about["perplexity"]["excess_nats"]) < 0.02


@llama_cpp
@pytest.mark.parametrize("quantize", ["f16", "bf16", "q5_1", "q4_0"])
def test_other_types_run(tmp_path, quantize):
    folder = vocabularies.save(random_model(hidden_size=64, **SIZES), tmp_path / "model")
    result = export(folder, format="gguf", quantize=quantize, out=tmp_path / "out")
    assert result.details.rounding > 0
    assert abs(result.details.quality.excess_nats) < 0.1
    stored, kinds = read_tensors(tmp_path / "out" / FILE), set()
    for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors:
        kinds.add(tensor.tensor_type.name.lower())
    assert kinds == {"f32", quantize}
    wanted = load_checkpoint(folder).tensors()["backbone.layers.0.mixer.in_proj.weight"].numpy()
    np.testing.assert_allclose(stored["blk.0.ssm_in.weight"], wanted, atol=np.abs(wanted).max() / 7)


@llama_cpp
@pytest.mark.parametrize("kind", ["gpt-2", "gpt-neox", "llama-3", "qwen2"])
def test_its_tokenizer_cuts_text_as_ours_does(tmp_path, kind):
    folder = vocabularies.save(random_model(**SIZES), tmp_path / "model", kind)
    export(folder, format="gguf", out=tmp_path / "out")
    ours = vocabularies.tokenizer(kind)
    with LlamaCpp(tmp_path / "out" / FILE) as llama:
        for text in (*vocabularies.LINES, "we'LL 1234567 cafés\r\n\r\n  x  y<|turn|>z", "\u00a0\u3000 tab\t!"):
            assert llama.count_tokens(text) == len(ours(text)["input_ids"]), text


def test_special_tokens_and_ends_of_turn(tmp_path):
    folder = vocabularies.save(random_model(**SIZES), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2]}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export(folder, format="gguf", out=tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    keys = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}
    assert [keys[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [0, 1, 2]
    assert keys["ggml.add_bos_token"] is False
    assert keys["chat_template"].startswith("{% for m")
    kinds = keys["ggml.token_type"]
    assert kinds[:2] == [3, 3]
    assert kinds[-1] == 5  # rows of the embedding without a token
    assert keys["ggml.tokens"][-1] == "[PAD391]"


def test_the_same_export_twice_gives_the_same_bytes(artefact, tmp_path):
    again = export(artefact, format="gguf", quantize="q8_0", out=tmp_path / "q8").directory
    for path in again.iterdir():
        assert path.read_bytes() == (artefact / "q8" / path.name).read_bytes(), path.name


@llama_cpp
def test_a_file_that_is_another_model_is_not_written(tmp_path, monkeypatch):
    """llama.cpp itself notices: the tensors are those that were given."""
    folder, out = vocabularies.save(random_model(**SIZES), tmp_path / "model"), tmp_path / "out"
    layout = layouts.LAYOUTS.find("mamba")
    right = layout.entries

    def wrong(config, sizes, tensors):
        for entry in right(config, sizes, tensors):
            yield entry._replace(tensor=entry.tensor * 1.01) if entry.name == "blk.1.ssm_d" else entry

    monkeypatch.setattr(layout, "entries", wrong)
    with pytest.raises(VerificationError, match=r"llama\.cpp's log probabilities differ"):
        export(folder, format="gguf", out=out)
    monkeypatch.setattr(layout, "keys", lambda config, sizes: {})
    with pytest.raises(VerificationError, match=r"llama\.cpp cannot run .*key not found"):
        export(folder, format="gguf", out=out)
    assert not out.exists()


def test_without_llama_cpp_tensors_are_read_back(tmp_path, monkeypatch):
    folder = vocabularies.save(random_mamba2(**SIZES), tmp_path / "model")
    monkeypatch.setattr("ssmc.exporters.gguf.proof.is_installed", lambda: False)
    result = export(folder, format="gguf", out=tmp_path / "out")
    assert "read back" in result.remarks[0]
    assert result.comparison.tokens == 0
    assert read_manifest(tmp_path / "out").about["gguf"]["run_by"] is None


def test_refusals(tmp_path):
    random_model(**SIZES).save_pretrained(tmp_path / "silent")
    refused = {
        "comes without a tokenizer": tmp_path / "silent",
        "none that GGUF files are written with: those of GPT-2": vocabularies.save(
            random_model(**SIZES), tmp_path / "split", "other"
        ),
        "d_inner of 2 x d_model only, that is 48, here it is 40": vocabularies.save(
            random_model(intermediate_size=40, **SIZES), tmp_path / "narrow"
        ),
        "does not limit time steps": vocabularies.save(
            random_mamba2(time_step_limit=(0.0, 0.1), **SIZES), tmp_path / "limits"
        ),
        "MLPs or experts in such a model, not both": vocabularies.save(nemotron_h(**SIZES), tmp_path / "mixed"),
    }
    for reason, folder in refused.items():
        with pytest.raises(UsageError, match=reason):
            export(folder, format="gguf", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    path = refused["does not limit time steps"] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}
    (tmp_path / "silent" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="Unigram, and GGUF files are written with byte-level BPE"):
        export(tmp_path / "silent", format="gguf", out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"no quantize 'q9' for GGUF. Choose f32 or f16"):
        export("tiny", format="gguf", quantize="q9", out=tmp_path / "out")
