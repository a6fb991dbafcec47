"""ONNX graphs of Mamba-2: what is its own beside the tests of all graphs in test_onnx.py; pruned models end to end."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from transformers import Mamba2ForCausalLM

import ssmc.exporters.onnx.graph as graph_module
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.layers import mamba2
from ssmc.exporters.onnx.ops import ssd
from ssmc.exporters.onnx.running import open_written
from ssmc.exporters.onnx.verify import prove
from ssmc.runtime.errors import CheckpointError, UsageError, VerificationError
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import OnnxSession, generate, open_session
from ssmc.runtime.models.generation.onnx_graph import open_graph
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from tests.support.commandline import run as ssmc
from tests.support.models import random_mamba2, random_model, random_tokens, save_transformers
from tests.support.onnx_runs import assert_close, graph, read, stock, tensors_of

TARGETS = ("portable", "ort")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory, text):
    """`tiny-mamba2` with half of its states, and its graphs: onnx/ (portable), ort/ and int8/."""
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny-mamba2", out=out, sparsity=0.5, score="ghost", repair=False, nsamples=1, seqlen=128)
    export(out, format="onnx")
    export(out, format="onnx", target="ort", out=out / "ort")
    export(out, format="onnx", quantize="int8", text=text, out=out / "int8")
    return out


def operators(graph):
    """(domain, name) of all operators of a graph and of the graphs inside it."""
    found = set()
    for node in graph.node:
        found.add((node.domain, node.op_type))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= operators(attribute.g)
    return found


@torch.no_grad()
def states_of(model, tokens, layer):
    """What stock transformers remembers after some tokens, as the graph lays it out: conv (B, K - 1, D), ssm."""
    cache = model(tokens, use_cache=True).cache_params
    conv = cache.layers[layer].conv_states[0][:, :, 1 - model.config.conv_kernel :]
    return conv.transpose(1, 2).numpy(), cache.layers[layer].recurrent_states[0].transpose(2, 3).numpy()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_prompt_above_two_chunks_and_64_steps(groups, target, tmp_path):
    """The prompt's length is no multiple of a chunk; the states after it are those of stock transformers."""
    model = random_mamba2(n_groups=groups)
    session = graph(model, tmp_path, target=target)
    prompt = 2 * ssd.CHUNK + 13
    tokens = random_tokens((2, prompt + 64))
    wanted = stock(model, tokens)
    logits, states = read(session, tokens[:, :prompt])
    assert_close(logits[:, 0], wanted[:, prompt - 1])
    conv, ssm = states_of(model, tokens[:, :prompt], layer=1)
    assert_close(states["past_conv_1"], conv)
    assert_close(states["past_ssm_1"], ssm)
    for end in range(prompt + 1, prompt + 65):
        logits, states = read(session, tokens[:, end - 1 : end], states)
        assert_close(logits[:, 0], wanted[:, end - 1])


VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True, "use_conv_bias": True},
    "no biases": {"use_bias": False, "use_conv_bias": False},
    "another width of the convolution": {"conv_kernel": 2},
    "another norm": {"layer_norm_epsilon": 0.3},
    "as many groups as heads": {"n_groups": 12},
    "one head": {"n_groups": 1, "num_heads": 1, "head_dim": 48},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
def test_variants(changes, target, tmp_path):
    model, tokens = random_mamba2(**changes), random_tokens((2, 7))
    session = graph(model, tmp_path, logits="all", target=target)
    first, states = read(session, tokens[:, :4])
    second, states = read(session, tokens[:, 4:6], states)
    third, _ = read(session, tokens[:, 6:], states)
    assert_close(np.concatenate([first, second, third], axis=1), stock(model, tokens))


@pytest.mark.parametrize("limit", [(0.0, 0.3), (0.2, float("inf")), (0.2, 0.5)])
def test_limits_of_the_time_step(limit, tmp_path):
    """Padding is no time step at all, whatever the lowest is."""
    model, tokens = random_mamba2(time_step_limit=limit), random_tokens((1, 6))
    session = graph(model, tmp_path, logits="all")
    wanted = stock(model, tokens)
    assert np.abs(wanted - stock(random_mamba2(), tokens)).max() > 1e-2 * np.abs(wanted).max()
    padded = torch.cat([tokens[:, :3], torch.zeros(1, 4, dtype=torch.long), tokens[:, 3:]], dim=1)
    logits, _ = read(session, padded, mask=[[1] * 3 + [0] * 4 + [1] * 3])
    assert_close(logits[:, [0, 1, 2, 7, 8, 9]], wanted)


def test_no_tokens_are_an_error_of_onnxruntime_and_not_the_end_of_the_process(tmp_path):
    """A division by zero tokens would be: as in Mamba-1, the scan refuses them."""
    with pytest.raises(InvalidArgument, match="Scan"):
        read(graph(random_mamba2(num_hidden_layers=1), tmp_path), torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("target", TARGETS)
def test_heads_that_forget_at_once_and_heads_that_never_do(target, tmp_path):
    """Decays from exp(-500) to 1 a token within a chunk: nothing overflows, nothing is lost."""
    model = random_mamba2(num_hidden_layers=1)
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.copy_(torch.linspace(-30, 6, 12))
    tokens = random_tokens((1, ssd.CHUNK + 20))
    assert_close(read(graph(model, tmp_path, logits="all", target=target), tokens)[0], stock(model, tokens))


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_unequal_sizes(target, tmp_path):
    """Against a model of the full size in which what is cut was silenced."""
    model = random_mamba2()
    architecture = architecture_for("mamba2")
    kept = [[0, 3, 5, 7, 9, 13], [1, 12], list(range(14))]  # of two groups of 7 states
    for block, states in zip(model.backbone.layers, kept, strict=True):
        architecture.mask_states(block.mixer, states)
    cut, _, _ = architecture.cut(tensors_of(model), model.config, STATE, kept)
    session = graph(model, tmp_path, cut, logits="all", target=target)
    shapes = {value.name: value.shape[1:] for value in session.get_inputs()}
    assert [shapes[f"past_ssm_{layer}"] for layer in range(3)] == [[12, n, 4] for n in (3, 1, 7)]
    assert shapes["past_conv_1"] == [3, 48 + 4]
    tokens = random_tokens((2, 9))
    first, carried = read(session, tokens[:, :5])
    second, _ = read(session, tokens[:, 5:], carried)
    assert_close(np.concatenate([first, second], axis=1), stock(model, tokens))


@pytest.mark.parametrize("target", TARGETS)
def test_the_operators_of_a_graph(target, tmp_path):
    model = random_mamba2()
    graph(model, tmp_path, target=target)
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    used = operators(written.graph)
    assert ("com.microsoft", "LinearAttention") in used or target == "portable"
    assert {domain for domain, _ in used} == ({""} if target == "portable" else {"", "com.microsoft"})
    numbers = sum(t.numel() for t in tensors_of(model).values())
    stored = [t for t in written.graph.initializer if t.name.startswith("backbone")]
    assert sum(int(np.prod(t.dims)) for t in stored) == numbers


def ungrouped(norm):
    """One norm over all channels, as there is for one group."""

    def wrong(op, layer, y, z):
        weight = layer.weights.float32(layer.prefix + "norm.weight")
        y = op.Mul(y, mamba2.silu(op, z))
        return op.RMSNormalization(y, weight, axis=-1, epsilon=float(layer.config.layer_norm_epsilon))

    return wrong


def forget_states(chunked):
    """A prompt that starts every piece from zeros."""

    def wrong(op, heads, chunks, inputs, past):
        return chunked(op, heads, chunks, inputs, op.Mul(past, 0.0))

    return wrong


def one_group(per_head):
    """All heads read B and C of the first group."""

    def wrong(op, heads, x):
        return op.Gather(x, [0] * heads.heads, axis=-3)

    return wrong


@pytest.mark.parametrize(
    ("module", "name", "fault", "way"),
    [
        (mamba2, "_gated_norm", ungrouped, "prefill|decode|padded"),
        (ssd, "chunked", forget_states, "split prefill|padded"),
        (ssd, "_per_head", one_group, "prefill|decode|padded"),
    ],
)
def test_the_proof_notices(module, name, fault, way, tmp_path, monkeypatch):
    """A graph with a fault does not pass; the right one does."""
    model, tokens = random_mamba2(), random_tokens((2, 80))
    comparison, ways = prove(model, graph(model, tmp_path / "right"), tokens, real_text=False)
    assert comparison.max_difference == max(w.max_difference for w in ways) <= comparison.tolerance
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(VerificationError, match=way):
        prove(model, graph(model, tmp_path / "wrong"), tokens, real_text=False)


def test_float16_products(tmp_path):
    model, tokens = random_mamba2(), random_tokens((2, 9))
    wanted = stock(model, tokens)
    found = read(graph(model, tmp_path, logits="all", dtype="float16"), tokens)[0]
    assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 2e-2  # rounded, but no more than that


# --- pruned models, from the command line to text --------------------------------------------------------------------


def test_exports_of_a_pruned_model(artefact):
    for name in ("onnx", "ort", "int8"):
        manifest = json.loads((artefact / name / "ssmc.json").read_text())
        assert {layer["d_state"] for layer in manifest["onnx"]["layers"]} == {32}
        assert manifest["comparison"]["max_difference"] <= manifest["comparison"]["tolerance"]
        assert manifest["settings"]["target"] == ("ort" if name == "ort" else "portable")
        assert (manifest["perplexity"] is None) == (name != "int8")


@pytest.mark.parametrize("name", ["onnx", "ort"])
def test_text_and_perplexity_are_those_of_torch(name, artefact, text):
    ours, theirs = open_session(artefact / name, device="cpu"), open_session(artefact, device="cpu")
    assert isinstance(ours.session, OnnxSession)
    for prompt in ("Once upon a time", "One day, a girl named Lily went to the"):
        written = "".join(generate(ours, prompt, max_new_tokens=20))
        assert written == "".join(generate(theirs, prompt, max_new_tokens=20))
    masked = load_checkpoint(artefact, dtype=torch.float32)
    stream = tokenize(read_texts(text), load_tokenizer(masked))[:512]
    wanted = perplexity(use_fast_scan(masked.model), stream, 256)
    got = perplexity(OnnxSession(open_graph(artefact / name, "cpu", all_logits=True)), stream, 256)
    assert got.window_nll == pytest.approx(wanted.window_nll, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_heads_and_states_pruned_together(target, tmp_path):
    """The graph computes what stock transformers computes with the same cuts, the epsilon of the norms included."""
    model = save_transformers(random_mamba2(state_size=8), tmp_path / "model")
    out, scores = tmp_path / "out", {"column": "random", "channel": "random"}
    compress(model, out=out, pattern="column+channel", sparsity=0.5, score=scores, repair=False, nsamples=2, seqlen=64)
    export(out)
    result = export(out, format="onnx", target=target, logits="all")
    assert result.comparison.max_difference <= result.comparison.tolerance
    assert result.comparison.epsilon_difference > 0
    cut = Mamba2ForCausalLM.from_pretrained(out / "safetensors", dtype=torch.float32).eval()
    session, tokens = open_written(result.directory), random_tokens((2, 9))
    assert {tuple(v.shape[1:]) for v in session.get_inputs() if v.name.startswith("past_ssm")} == {(6, 4, 4)}
    assert_close(read(session, tokens)[0], stock(cut, tokens))


def test_int8_is_smaller_and_near(artefact):
    size = {name: (artefact / name / "model.onnx.data").stat().st_size for name in ("onnx", "int8")}
    assert size["int8"] < 0.35 * size["onnx"]
    measured = json.loads((artefact / "int8" / "ssmc.json").read_text())["perplexity"]
    assert 1e-4 < abs(measured["excess_nats"]) < 0.1
    ways = json.loads((artefact / "int8" / "ssmc.json").read_text())["rounding"]
    assert [way["name"] for way in ways] == ["prefill", "split prefill", "64 decode steps", "padded"]


def test_the_command_line(artefact, text, tmp_path, capsys):
    ours, theirs = (
        ssmc(capsys, "generate", folder, "The dog", "--max-new-tokens", 8) for folder in (artefact / "ort", artefact)
    )
    assert ours.out == theirs.out
    assert "onnx: read" in ours.err
    scored = ssmc(capsys, "eval", artefact / "ort", "--text", text, "--window", 256, "--out", tmp_path / "eval")
    assert scored.code == 0, scored.err
    model = save_transformers(random_mamba2(), tmp_path / "random")
    done = ssmc(capsys, "export", model, "--format", "onnx", "--target", "ort", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "LinearAttention" in done.out + done.err


def test_an_onnxruntime_that_lacks_the_operator(tmp_path, monkeypatch):
    for module in (ssd, graph_module):
        monkeypatch.setattr(module, "MICROSOFT", "com.microsoft.nowhere")
    model = save_transformers(random_mamba2(), tmp_path / "random")
    with pytest.raises(VerificationError, match=r"cannot load the graph.*nothing was written.*target portable"):
        export(model, format="onnx", target="ort", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path):
    with pytest.raises(CheckpointError, match=r"no ONNX graph of target 'ort' for models of type 'mamba'.*portable"):
        build(random_model().config, {}, Settings(target="ort"))
    with pytest.raises(UsageError, match="no target 'cuda' for ONNX"):
        export(tmp_path, format="onnx", target="cuda")
