"""`ssmc export --format onnx`: what is written, what it says of itself, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import MambaForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.onnx import quality
from ssmc.exporters.onnx.files import GRAPH
from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError, VerificationError
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.generation import open_session
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from tests.support.commandline import run as ssmc
from tests.support.models import random_model, save_transformers


@pytest.fixture(scope="module")
def artefact(tmp_path_factory, text):
    """A compressed model and its graphs: float32 in onnx/, int8 in int8/."""
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, sparsity=0.75, nsamples=2, seqlen=128)
    export(out, format="onnx")
    export(out, format="onnx", quantize="int8", text=Path(text), out=out / "int8")
    return out


@pytest.fixture(scope="module")
def stream(tiny, text):
    return tokenize(read_texts(text), load_tokenizer(tiny))


@pytest.fixture
def random_directory(tmp_path):
    return save_transformers(random_model(), tmp_path / "random")


def manifest_of(folder):
    return json.loads((folder / "ssmc.json").read_text())


def initializers(folder):
    return {t.name: t for t in onnx.load(folder / GRAPH).graph.initializer}


def metadata(folder):
    model = onnx.load(folder / GRAPH, load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def test_the_graph_is_the_compressed_model_and_is_smaller(artefact, stream):
    folder = artefact / "onnx"
    assert initializers(folder)["backbone.layers.0.mixer.A"].dims == [4, 512]
    masked = MambaForCausalLM.from_pretrained(artefact, dtype=torch.float32)
    tokens = stream[:60].view(2, 30)
    session = open_written(folder)
    logits, _ = run(session, tokens.numpy(), fresh_states(session, 2))
    with torch.no_grad():
        wanted = masked(tokens).logits[:, -1:].numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    manifest = manifest_of(folder)
    compared = manifest["comparison"]
    assert 0 < compared["max_difference"] <= compared["tolerance"] < 1e-3 * compared["largest_logit"]
    assert [way["name"] for way in compared["ways"]] == ["prefill", "split prefill", "64 decode steps", "padded"]
    assert compared["real_text"]
    assert manifest["perplexity"] is None
    assert set(manifest["files"]) >= {"config.json", "model.onnx", "model.onnx.data", "tokenizer.json"}


def test_a_graph_says_what_it_is(artefact):
    about = metadata(artefact / "int8")
    assert about["ssmc.architecture"] == "mamba"
    assert about["ssmc.logits"] == "last"
    assert about["ssmc.quantize"] == "int8"
    assert about["ssmc.tokenizer"] == "tokenizer.json"
    assert json.loads(about["ssmc.layers"])[5] == {"d_inner": 512, "d_state": 4, "dt_rank": 16, "d_conv": 4}
    provenance = json.loads(about["ssmc.provenance"])
    assert (provenance["pattern"], provenance["sparsity"]) == ("column", 0.75)
    layouts = json.loads(about["ssmc.layouts"])
    assert layouts["past_ssm_0"] == {"shape": ["batch", 4, 512], "dtype": "float32"}
    assert layouts["logits"] == {"shape": ["batch", 1, 4096], "dtype": "float32"}


def test_int8_holds_what_the_manifest_says_of_it(artefact, stream):
    """Only the large matrices are int8, the tied one once; perplexities are those of other code on the same text."""
    stored = initializers(artefact / "int8")
    whole = {name for name, t in stored.items() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2}
    assert {name.split(".weight")[0].rpartition(".")[2] for name in whole} == {"in_proj", "out_proj", "embeddings"}
    assert len(whole) == 6 * 3 + 1  # in_proj in two: the convolution's input, and the gate
    assert not any(t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 2**14 for t in stored.values())
    size = {name: (artefact / name / "model.onnx.data").stat().st_size for name in ("onnx", "int8")}
    assert size["int8"] < 0.35 * size["onnx"]
    measured = manifest_of(artefact / "int8")["perplexity"]
    dense = perplexity(load_checkpoint(artefact, dtype=torch.float32).model, stream, window=512)
    session = open_written(artefact / "int8", all_logits=True)
    losses = []
    for window in stream[: 2 * 512].view(2, 1, 512):
        logits = torch.from_numpy(run(session, window.numpy(), fresh_states(session, 1))[0]).double()
        right = logits[0, :-1].log_softmax(dim=-1).gather(1, window[0, 1:, None])
        losses.append(-float(right.mean()))
    assert measured["ppl_before"] == pytest.approx(dense.ppl, rel=1e-5)
    assert measured["ppl_after"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert 1e-4 < abs(measured["excess_nats"]) < 0.05
    assert dense.windows == 2
    assert measured["tokens"] == dense.tokens


def test_float32_has_the_perplexity_of_torch(artefact, stream):
    model = load_checkpoint(artefact, dtype=torch.float32).model
    measured = quality.measure(model, artefact / "onnx", stream[:600], "stories", lambda *_: None)
    assert measured.ppl_after == pytest.approx(measured.ppl_before, rel=1e-5)


def test_float16(artefact, text, tmp_path):
    export(artefact, format="onnx", dtype="float16", logits="all", text=text, out=tmp_path / "half")
    assert abs(manifest_of(tmp_path / "half")["perplexity"]["excess_nats"]) < 1e-3
    assert metadata(tmp_path / "half")["ssmc.dtype"] == "float16"
    (logits,) = (o for o in open_written(tmp_path / "half").get_outputs() if o.name == "logits")
    assert logits.shape == ["batch", "length", 4096]


def test_the_same_export_twice_gives_the_same_bytes(artefact, text, tmp_path):
    for name, options in (("onnx", {}), ("int8", {"quantize": "int8", "text": text})):
        again = export(artefact, format="onnx", out=tmp_path / name, **options).directory
        assert {p.name for p in again.iterdir()} == {p.name for p in (artefact / name).iterdir()}
        for path in again.iterdir():
            assert path.read_bytes() == (artefact / name / path.name).read_bytes(), path.name


def test_dense_models_and_such_without_a_tokenizer(random_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export(random_directory, format="onnx", quantize="int8")
    assert result.directory.resolve() == tmp_path / "random-onnx"
    manifest = manifest_of(result.directory)
    assert manifest["perplexity"]["text"] == "random tokens"
    assert not manifest["comparison"]["real_text"]
    assert metadata(result.directory)["ssmc.tokenizer"] == "null"
    assert not (result.directory / "tokenizer.json").exists()
    with pytest.raises(UsageError, match="without a tokenizer"):
        export(random_directory, format="onnx", quantize="int8", text=str(heldout_path()), force=True)


def test_a_layer_of_another_size(artefact, tmp_path):
    """What a pattern leaves uneven is cut to each layer's own size."""
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy, ignore=shutil.ignore_patterns("onnx", "int8"))
    manifest = manifest_of(copy)
    model = load_checkpoint(copy, dtype=torch.float32)
    kept = manifest["layers"][2]["kept"][:1]
    model.architecture.mask_states(model.architecture.mixer(model.architecture.blocks(model.model)[2]), kept)
    model.model.save_pretrained(copy)
    manifest["layers"][2]["kept"] = kept
    (copy / "ssmc.json").write_text(json.dumps(manifest))
    folder = export(copy, format="onnx").directory
    assert [layer["d_state"] for layer in manifest_of(folder)["onnx"]["layers"]] == [4, 4, 1, 4, 4, 4]


def damage(folder, kind):
    data = folder / "model.onnx.data"
    if kind == "missing":
        data.unlink()
    elif kind == "short":
        data.write_bytes(data.read_bytes()[:-1000])
    elif kind == "one bit":
        content = bytearray(data.read_bytes())
        content[5000] ^= 4
        data.write_bytes(content)
    elif kind == "no graph":
        (folder / GRAPH).write_bytes(b"not a graph")


@pytest.mark.parametrize("kind", ["missing", "short", "one bit", "no graph"])
@pytest.mark.parametrize("manifest", [True, False])
def test_damaged_files_are_a_clear_error(artefact, tmp_path, kind, manifest):
    folder = tmp_path / "onnx"
    shutil.copytree(artefact / "onnx", folder)
    damage(folder, kind)
    if not manifest:
        (folder / "ssmc.json").unlink()
        if kind == "one bit":
            return  # nothing is left that could tell
    with pytest.raises(CheckpointError, match=r"model\.onnx.*Export"):
        open_session(folder)


def test_refusals(artefact, random_directory, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="--force"):
        export(artefact, format="onnx")
    with pytest.raises(UsageError, match="no dtype 'bfloat16' for ONNX"):
        export(artefact, format="onnx", dtype="bfloat16")
    with pytest.raises(UsageError, match="no quantize 'int4'"):
        export(artefact, format="onnx", quantize="int4")
    with pytest.raises(UsageError, match="goes with float32"):
        export(artefact, format="onnx", quantize="int8", dtype="float16")
    with pytest.raises(UsageError, match="--quantize is an option of the format onnx and gguf, not of safetensors"):
        export(artefact, quantize="int8")
    with pytest.raises(UsageError, match="is an export already"):
        export(artefact / "onnx", format="onnx", out=tmp_path / "again")
    with pytest.raises(CheckpointError, match="no model at"):
        export(tmp_path / "nothing", format="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for name in [name for name in sys.modules if name.startswith("ssmc.exporters.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r"needs onnxscript: pip install 'ssmc\[onnx\]'"):
        export(random_directory, format="onnx", out=tmp_path / "none")


def test_a_graph_that_fails_its_proof_is_not_written(random_directory, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("ssmc.exporters.onnx.layers.mamba.silu", lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, 1.01))))
        with pytest.raises(VerificationError, match="nothing was written"):
            export(random_directory, format="onnx", out=out)
    assert not out.exists()
    monkeypatch.setattr("ssmc.exporters.quality.MOST_LOST", -9.0)
    with pytest.raises(VerificationError, match=r"loses .* nats a token"):
        export(random_directory, format="onnx", out=out, quantize="int8")
    assert {p.name for p in tmp_path.iterdir()} == {"random"}


def test_the_command_line_says_what_it_found(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = ssmc(capsys, "export", "tiny", "--format", "onnx", "--quantize", "int8", "--text", text)
    assert done.code == 0, done.err
    assert "Largest difference of a logit to the dense model" in done.out
    assert "nats a token" in done.out
    assert (tmp_path / "tiny-onnx" / "model.onnx").is_file()
    wrong = ssmc(capsys, "export", "tiny", "--format", "onnx", "--out", "tiny-onnx")
    assert "--force" in wrong.sentence(5)
