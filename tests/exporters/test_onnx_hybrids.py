"""Hybrids and Falcon-Mamba as ONNX graphs beside stock transformers: mixers, attention with a growing cache, MLPs."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="ONNX exports need the extra `onnx`")

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.files import write_graph
from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import TorchSession, generate_batch, load_onnx_export, open_session
from ssmc.runtime.text import read_texts
from ssmc.runtime.tiny import heldout_path
from tests.support.families import bamba, falcon_h1, falcon_mamba, granite, jamba, nemotron_h, zamba2

KINDS = ["linear_attention", "mlp", "full_attention", "linear_attention"]
LENGTH = 25
MODELS = {
    # stock transformers has the least time step in prompts only: small enough not to matter
    "nemotron_h": lambda: nemotron_h(layers_block_type=KINDS, time_step_min=1e-9),
    "nemotron_h-experts": lambda: nemotron_h(time_step_min=1e-9),
    "zamba2": lambda: zamba2(time_step_min=1e-9),
    "jamba": jamba,
    "falcon_mamba": lambda: falcon_mamba(layer_norm_epsilon=1e-2, mixer_rms_eps=1e-3),
    "granite-experts": granite,
    "bamba": bamba,
    "granite": lambda: granite(num_local_experts=0),
    "granite-no-positions": lambda: granite(num_local_experts=0, position_embedding_type=None),
    "falcon_h1": falcon_h1,
    "falcon_h1-norm-first": lambda: falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=True),
    "bamba-partly-rotated": lambda: bamba(
        head_dim=8, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
}
TARGETS = {"nemotron_h-experts": "ort", "falcon_h1": "ort", "bamba": "genai", "jamba": "genai", "zamba2": "genai"}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Stock transformers' model, its tokens and logits, and a session of the graph."""
    model = MODELS[request.param]()
    tokens = torch.randint(0, 60, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits.numpy()
    folder = tmp_path_factory.mktemp("graph")
    target = TARGETS.get(request.param, "portable")
    write_graph(folder, build(model.config, tensors_of(model), Settings(logits="all", target=target)).model)
    return model, tokens.numpy(), wanted, open_written(folder)


def tensors_of(model):
    state = model.state_dict()
    return {name: state[name] for name in state if name not in model.all_tied_weights_keys}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("pieces", [(LENGTH,), (1,) * LENGTH, (10, 15), (3, 1, 1, 9, 11)], ids=str)
def test_any_pieces_are_what_stock_transformers_computes(case, pieces):
    _, tokens, wanted, session = case
    states, found, at = fresh_states(session, len(tokens)), [], 0
    for piece in pieces:
        logits, states = run(session, tokens[:, at : at + piece], states)
        found.append(logits)
        at += piece
    close(np.concatenate(found, axis=1), wanted)


def test_what_stock_transformers_reads_token_by_token(case):
    """Its own cache, not only its own whole prompt."""
    model, tokens, _, session = case
    hybrid = model.config.model_type != "falcon_mamba"
    states, cache = fresh_states(session, len(tokens)), None
    for at in range(5):
        # as its own generate does: by itself it asks the first layer how far it is, which may have no cache
        where = {"position_ids": torch.full((3, 1), at), "attention_mask": torch.ones(3, at + 1, dtype=torch.long)}
        where = {"past_key_values": cache, **where} if hybrid else {"cache_params": cache}
        with torch.no_grad():
            out = model(torch.from_numpy(tokens[:, at : at + 1]), use_cache=True, **where)
        cache = out.past_key_values if hybrid else out.cache_params
        logits, states = run(session, tokens[:, at : at + 1], states)
        close(logits, out.logits.numpy())


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_changes_nothing_now_or_later(case, where):
    _, tokens, wanted, session = case
    counts, mask = (9, 5, 12), np.zeros((3, 12), np.int64)
    given = np.full((3, 12), 7)
    for row, count in enumerate(counts):
        place = {
            "left": range(12 - count, 12),
            "right": range(count),
            "middle": [*range(count - 2), *range(10, 12)],
        }[where]
        mask[row, list(place)] = 1
        given[row, list(place)] = tokens[row, :count]
    logits, states = run(session, given, fresh_states(session, 3), mask)
    for row, count in enumerate(counts):
        close(logits[row][mask[row] == 1], wanted[row, :count])
    more = np.stack([tokens[row, count : count + 2] for row, count in enumerate(counts)])
    logits, _ = run(session, more, states)
    for row, count in enumerate(counts):
        close(logits[row], wanted[row, count : count + 2])


def test_what_has_no_graph_is_refused_before_work(tmp_path):
    longer = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused = {
        "depend on the length": bamba(rope_parameters=longer),
        "some of their groups": nemotron_h(n_routed_experts=4, n_group=2, topk_group=1),
        "relu2": nemotron_h(mlp_hidden_act="silu"),
        "this model's is relu": zamba2(hidden_act="relu"),
    }
    for said, model in refused.items():
        model.save_pretrained(tmp_path / said)
        with pytest.raises(CheckpointError, match=said):
            export(tmp_path / said, format="onnx", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The embedded hybrid without half of its states, and its graphs."""
    out = tmp_path_factory.mktemp("hybrid") / "half"
    compress("tiny-hybrid", out=out, sparsity=0.5, score="random", repair=False)
    few = out.with_name("few.txt")
    few.write_text(read_texts(heldout_path()).joined()[:6000])
    return export(out, format="onnx"), export(out, format="onnx", quantize="int8", out=out / "int8", text=few)


def test_sessions_of_a_pruned_hybrid(hybrid):
    plain, small = hybrid
    assert plain.comparison.max_difference < plain.comparison.tolerance
    assert small.weight_bytes[1] < 0.45 * plain.weight_bytes[1]
    assert small.details.quality.excess_nats < 0.05
    opened = open_session(plain.directory)
    dense = TorchSession(use_fast_scan(load_checkpoint(plain.directory.parent, dtype=torch.float32).model))
    tokens = torch.randint(0, 4096, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # a session is used again
        opened.session.reset()
        dense.reset()
        close(opened.session.prefill(tokens).numpy(), dense.prefill(tokens).numpy())
        for step in range(3):
            close(opened.session.step(tokens[:, step]).numpy(), dense.step(tokens[:, step]).numpy())
        close(opened.session.prefill(tokens[:, 3:]).numpy(), dense.prefill(tokens[:, 3:]).numpy())
    prompts = ["Once upon a time", "The dog"]
    torch_model = open_session(plain.directory.parent)
    both = [generate_batch(loaded, prompts, max_new_tokens=6, temperature=0.0) for loaded in (opened, torch_model)]
    assert both[0] == both[1]
    read = load_onnx_export(plain.directory)
    assert read.kept_per_token == 2 * 2 * 2 * 32 + 1  # keys and values of 2 layers, 2 heads each, and the mask
    assert read.dimensions.d_state == 32
