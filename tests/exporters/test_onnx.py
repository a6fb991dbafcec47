"""ONNX graphs: onnxruntime computes what stock transformers computes, however the tokens come."""

import numpy as np
import onnx
import pytest
import torch

import ssmc.exporters.onnx.graph as graph_module
from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.layers import mamba
from ssmc.exporters.onnx.running import open_written
from ssmc.exporters.onnx.verify import prove
from ssmc.runtime.errors import CheckpointError, VerificationError
from ssmc.runtime.models.families import CHANNEL, STATE, architecture_for
from tests.support.models import PADDED, random_mamba2, random_model, random_tokens
from tests.support.onnx_runs import MASKS, assert_close, graph, read, stock, tensors_of

PAIRS = {f"{n} states": (random_model, {"state_size": n}, "portable") for n in (16, 8, 5, 1)} | {
    "Mamba-2, 2 groups": (random_mamba2, {}, "portable"),
    "Mamba-2, 1 group": (random_mamba2, {"n_groups": 1, "num_heads": 6, "head_dim": 8, "state_size": 16}, "portable"),
    "Mamba-2, 2 groups, ort": (random_mamba2, {}, "ort"),
    "Mamba-2, 1 group, ort": (random_mamba2, {"n_groups": 1, "num_heads": 3, "head_dim": 16, "state_size": 1}, "ort"),
}


@pytest.fixture(scope="module", params=PAIRS.values(), ids=PAIRS)
def pair(request, tmp_path_factory):
    """A random model and its graph, which gives all logits."""
    make, changes, target = request.param
    model = make(**changes)
    return model, graph(model, tmp_path_factory.mktemp("graph"), logits="all", target=target)


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """A random model, its graph, which gives the last token's logits, and where that lies."""
    model, folder = random_model(), tmp_path_factory.mktemp("last")
    return model, graph(model, folder), folder


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 64, 150])
def test_logits_are_those_of_stock_transformers(pair, batch, length):
    model, session = pair
    tokens = random_tokens((batch, length))
    assert_close(read(session, tokens)[0], stock(model, tokens))


@pytest.mark.parametrize("split", [[1] * 12, [3, 9], [9, 3], [1, 2, 9], [11, 1], [5, 1, 1, 5]])
def test_states_carry_over_any_split(pair, split):
    model, session = pair
    tokens = random_tokens((3, 12))
    pieces, states, whole = [], None, read(session, tokens)[1]
    for piece in tokens.split(split, dim=1):
        logits, states = read(session, piece, states)
        pieces.append(logits)
    assert_close(np.concatenate(pieces, axis=1), stock(model, tokens))
    for name, state in states.items():
        assert_close(state, whole[name])


def test_a_long_sequence(tmp_path):
    model = random_model(num_hidden_layers=1)
    tokens = random_tokens((1, 2048))
    assert_close(read(graph(model, tmp_path), tokens)[0][:, 0], stock(model, tokens)[:, -1])


def test_the_trained_model(tiny, tmp_path):
    tokens = random_tokens((2, 40))
    assert_close(read(graph(tiny.model, tmp_path, logits="all"), tokens)[0], stock(tiny.model, tokens))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("history", [0, 2, 7])
def test_padding_changes_nothing(pair, mask, history):
    """Rows of a padded batch, one by one and without padding: logits, and those of two tokens more."""
    model, session = pair
    before, more = random_tokens((3, history), seed=1), random_tokens((3, 2), seed=2)
    tokens, real = random_tokens((3, 6)), torch.tensor(mask).bool()
    states = None if history == 0 else read(session, before)[1]
    logits, states = read(session, tokens, states, mask)
    after, _ = read(session, more, states)
    for row in range(3):
        alone = torch.cat([before[row], tokens[row][real[row]], more[row]])[None]
        wanted = stock(model, alone)[0, history:]
        assert_close(np.concatenate([logits[row][real[row]], after[row]]), wanted)


def test_padding_with_the_last_logits_only(last):
    model, session, _ = last
    tokens = random_tokens((3, 6))
    for mask in MASKS.values():
        logits, _ = read(session, tokens, mask=mask)
        for row in range(3):
            alone = tokens[row][torch.tensor(mask[row]).bool()][None]
            assert_close(logits[row, 0], stock(model, alone)[0, -1])


def test_one_token_of_padding(pair):
    """A sequence that has ended is given padding while the others go on."""
    model, session = pair
    tokens = random_tokens((2, 7))
    _, states = read(session, tokens[:, :5])
    _, states = read(session, tokens[:, 5:6], states, [[1], [0]])
    logits, _ = read(session, tokens[:, 6:], states)
    assert_close(logits[0], stock(model, tokens[:1])[0, -1:])
    assert_close(logits[1], stock(model, tokens[1:, [0, 1, 2, 3, 4, 6]])[0, -1:])


@pytest.mark.parametrize("length", [1, 4])
def test_a_row_of_padding_keeps_its_states_bit_by_bit(last, length):
    _, session, _ = last
    _, states = read(session, random_tokens((2, 5)))
    _, after = read(session, random_tokens((2, length)), states, [[0] * length, [1] * length])
    for name, state in after.items():
        np.testing.assert_array_equal(state[0], states[name][0])
        assert np.abs(state[1] - states[name][1]).max() > 1e-3


VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True, "use_conv_bias": True},
    "no biases": {"use_bias": False, "use_conv_bias": False},
    "another width of the convolution": {"conv_kernel": 2},
    "another norm and residual": {"layer_norm_epsilon": 0.3, "residual_in_fp32": False},
    "d_inner not twice d_model": {"intermediate_size": 40},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("own_head", [False, True])
def test_variants(changes, own_head, tmp_path):
    model, tokens = random_model(**changes), random_tokens((2, 7))
    session = graph(model, tmp_path, logits="all", own_head=own_head)
    first, states = read(session, tokens[:, :4])
    second, _ = read(session, tokens[:, 4:], states)
    assert_close(np.concatenate([first, second], axis=1), stock(model, tokens))


@torch.no_grad()
def test_layers_of_unequal_sizes(tmp_path):
    """Against a model of the full size in which what is cut was silenced."""
    model = random_model()
    architecture, config = architecture_for("mamba"), model.config
    states = [[0, 3, 5], [1], [0, 1, 2, 3, 4, 5]]
    channels = [list(range(0, 48, 2)), list(range(48)), [7, 11, 40]]
    for layer, block in enumerate(model.backbone.layers):
        architecture.mask_states(block.mixer, states[layer])
        architecture.mask(block.mixer, CHANNEL, channels[layer])
    cut, _, _ = architecture.cut(tensors_of(model), config, STATE, states)
    cut, _, _ = architecture.cut(cut, config, CHANNEL, channels)
    session = graph(model, tmp_path, cut, logits="all")
    shapes = {value.name: value.shape[1:] for value in session.get_inputs()}
    assert shapes["past_ssm_0"] == [3, 24]
    assert shapes["past_ssm_1"] == [1, 48]
    assert shapes["past_conv_2"] == [3, 3]
    tokens = random_tokens((2, 9))
    first, carried = read(session, tokens[:, :5])
    second, _ = read(session, tokens[:, 5:], carried)
    assert_close(np.concatenate([first, second], axis=1), stock(model, tokens))


def test_time_steps_far_from_the_middle(tmp_path):
    """softplus, where its input is so small that 1 + exp rounds, and where it is large."""
    for bias in (-30.0, -12.0, 25.0):
        model = random_model(num_hidden_layers=1)
        with torch.no_grad():
            model.backbone.layers[0].mixer.dt_proj.bias.fill_(bias)
            model.backbone.layers[0].mixer.dt_proj.weight.mul_(0.1)
            model.backbone.layers[0].mixer.D.zero_()  # all that is left comes through the states
        tokens = random_tokens((1, 20))
        _, states = read(graph(model, tmp_path / str(bias)), tokens)
        cache = model(tokens, use_cache=True).cache_params
        wanted = cache.layers[0].recurrent_states[0].detach().transpose(1, 2).numpy()
        np.testing.assert_allclose(states["past_ssm_0"], wanted, rtol=3e-5, atol=1e-9)


def test_the_graph_says_everything_about_itself(last):
    _, session, folder = last
    names = ["input_ids", "attention_mask", *(f"past_{kind}_{i}" for i in range(3) for kind in ("conv", "ssm"))]
    assert [value.name for value in session.get_inputs()] == names
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert outputs["logits"] == ["batch", 1, PADDED]
    assert outputs["present_conv_1"] == ["batch", 3, 48]
    assert outputs["present_ssm_1"] == ["batch", 6, 48]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    (branches,) = {tuple(a.name for a in node.attribute) for node in model.graph.node if node.op_type == "If"}
    assert sorted(branches) == ["else_branch", "then_branch"]
    many = next(a.g for node in model.graph.node for a in node.attribute if a.name == "else_branch")
    assert [node.op_type for node in many.node].count("Scan") == 1
    assert sum(node.op_type == "RMSNormalization" for node in model.graph.node) == 3 + 1


def test_every_weight_is_stored_once(last):
    """No second copy of a tied head, and A in the place of A_log."""
    model, _, folder = last
    numbers = sum(t.numel() for t in tensors_of(model).values())
    stored = onnx.load(folder / "model.onnx").graph.initializer
    assert sum(int(np.prod(t.dims)) for t in stored if t.name.startswith("backbone")) == numbers
    assert (folder / "model.onnx.data").stat().st_size <= 4 * numbers


def test_float16_products(last, tmp_path):
    model, _, _ = last
    tokens = random_tokens((2, 9))
    session = graph(model, tmp_path, logits="all", dtype="float16")
    wanted, found = stock(model, tokens), read(session, tokens)[0]
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-2  # rounded, but no more than that
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    half = {t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT16}
    assert "backbone.embeddings.weight" in half
    assert "backbone.layers.0.mixer.A" not in half


def test_the_last_logits_become_all_of_them(last):
    model, _, folder = last
    tokens, mask = random_tokens((2, 6)), [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    session = open_written(folder, all_logits=True)
    assert_close(read(session, tokens)[0], stock(model, tokens))
    logits, _ = read(session, tokens, mask=mask)
    assert_close(logits[0, 2:], stock(model, tokens[:1, 2:])[0])
    assert_close(logits[1, :4], stock(model, tokens[1:, :4])[0])


def test_what_there_is_no_graph_for():
    config = random_model().config
    config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="silu"):
        build(config, {}, Settings())
    config.model_type = "bert"
    with pytest.raises(CheckpointError, match="no ONNX graph for models of type 'bert'"):
        build(config, {}, Settings())


def forget_inputs(convolve):
    """A convolution that starts every piece from zeros."""

    def wrong(op, weights, name, x, past, tokens, *tail):
        return convolve(op, weights, name, x, op.Mul(past, 0.0), tokens, *tail)

    return wrong


def see_padding(real_first):
    """Tokens without a mask: the states move at padded positions."""

    def wrong(op, input_ids, attention_mask):
        return real_first(op, input_ids, op.Add(op.Mul(attention_mask, 0), 1))

    return wrong


@pytest.mark.parametrize(
    ("module", "name", "fault", "way"),
    [
        (mamba, "convolve", forget_inputs, "split prefill|decode"),
        (graph_module, "real_first", see_padding, "padded"),
        (mamba, "softplus", lambda _: lambda op, x: op.Log(op.Add(op.Exp(x), 1.001)), "prefill|decode|padded"),
    ],
)
def test_the_proof_notices(module, name, fault, way, tmp_path, monkeypatch):
    """A graph with a fault that shows in one way of running it does not pass; the right one does."""
    model, tokens = random_model(), random_tokens((2, 80))
    comparison, ways = prove(model, graph(model, tmp_path / "right"), tokens, real_text=False)
    assert comparison.max_difference == max(w.max_difference for w in ways) <= comparison.tolerance
    assert [w.name for w in ways] == ["prefill", "split prefill", "64 decode steps", "padded"]
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(VerificationError, match=way):
        prove(model, graph(model, tmp_path / "wrong"), tokens, real_text=False)
