"""Graphs that keep SSM states in int8 or float16: against our sessions in torch, and the bytes they hold."""

import json

import numpy as np
import pytest
import torch

from ssmc.exporters import export
from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import load_onnx_export, open_session
from ssmc.runtime.models.generation.torch_session import TorchSession
from tests.support.families import bamba, random_ids
from tests.support.models import random_mamba2, random_model, save_transformers

MODELS = {"mamba": random_model, "mamba2": random_mamba2, "bamba": bamba}


@pytest.fixture(
    scope="module",
    params=[("mamba", "int8"), ("mamba2", "int8"), ("mamba2", "float16"), ("bamba", "int8")],
    ids="-".join,
)
def exported(request, tmp_path_factory):
    """A small random model, dense, and its graph; it has no tokenizer, so the text of the quality is random."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp("states")
    dense = save_transformers(MODELS[family](), folder / "dense")
    return dense, dtype, export(dense, format="onnx", state_dtype=dtype, out=folder / "onnx").directory


@torch.inference_mode()
def test_a_step_gives_the_codes_of_our_own_rounding(exported):
    """From the same states on, one token: the graph's states are those of torch, but where a last bit decides."""
    dense, dtype, folder = exported
    ids = random_ids(2, 12)
    ours = TorchSession(use_fast_scan(load_checkpoint(dense, dtype=torch.float32).model, state_dtype=dtype))
    wanted = ours.prefill(ids)
    session = open_written(folder)
    logits, states = run(session, ids.numpy(), fresh_states(session, 2))
    np.testing.assert_allclose(logits[:, -1], wanted, atol=1e-3)
    mixers = [(i, layer) for i, layer in enumerate(ours._cache.layers) if hasattr(layer, "recurrent_states")]
    for layer, cached in mixers:
        kept, codes = states[f"past_ssm_{layer}"], cached.recurrent_states[0]
        assert kept.dtype == {"int8": np.int8, "float16": np.float16}[dtype]
        same = codes.transpose(-1, -2).numpy() == kept
        if dtype == "int8":
            assert same.mean() > 0.95
            assert np.abs(codes.transpose(-1, -2).numpy().astype(int) - kept).max() <= 1
            scales, theirs = cached.recurrent_states[1], states[f"past_scale_{layer}"]
            ours_scales = scales.squeeze(2).numpy() if scales.dim() == 4 else scales.numpy()
            ours_scales = np.swapaxes(ours_scales, 1, 2) if codes.dim() == 3 else ours_scales[..., None]
            np.testing.assert_allclose(theirs.astype(np.float32), ours_scales.astype(np.float32), rtol=2e-3)
            assert theirs.dtype == np.float16
        else:
            assert same.mean() > 0.9
    more, _ = run(session, ids[:, :1].numpy(), states)
    np.testing.assert_allclose(more[:, -1], ours.step(ids[:, 0]), atol=0.2)


def test_a_session_holds_fewer_bytes_and_the_manifest_says_what_it_costs(exported):
    dense, dtype, folder = exported
    sizes = load_checkpoint(dense).dimensions
    opened = load_onnx_export(folder)
    windows = 4 * sizes.window_numbers // sizes.d_conv * (sizes.d_conv - 1)
    codes = sizes.ssm_numbers
    kept = codes + 2 * codes // sizes.scale_channels if dtype == "int8" else 2 * codes
    assert opened.state_bytes == kept + windows
    ids = random_ids(3, 9)
    logits = opened.model.prefill(ids).clone()
    opened.model.reset()
    opened.model.prefill(ids[:, :4])
    for token in ids[:, 4:].unbind(1):
        stepped = opened.model.step(token)
    assert 0 < float((stepped - logits).abs().max()) < 0.1 * float(logits.abs().max())
    opened.model.reset()
    opened.model.prefill(ids[:, :1])
    for token in ids[:, 1:].unbind(1):
        stepped = opened.model.step(token).clone()
    scored = [piece.clone() for piece in load_onnx_export(folder, all_logits=True).model.pieces(ids, 99)]
    assert len(scored) == ids.shape[1]  # a text is scored as if each of its tokens had been written
    torch.testing.assert_close(scored[-1][:, -1], stepped)
    manifest = json.loads((folder / "ssmc.json").read_text())
    assert manifest["settings"]["state_dtype"] == dtype
    assert manifest["perplexity"]["excess_nats"] != 0


def test_states_and_weights_may_both_be_int8(tmp_path):
    dense = save_transformers(random_mamba2(), tmp_path / "dense")
    folder = export(dense, format="onnx", quantize="int8", state_dtype="int8", out=tmp_path / "onnx").directory
    session = open_session(folder).session
    assert {slot.dtype for slot, _ in session.graph.states} == {torch.int8, torch.float16, torch.float32}
    assert session.prefill(random_ids(1, 5)).isfinite().all()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with pytest.raises(UsageError, match=r"keeps its states was chosen when it was exported"):
        open_session(folder, state_dtype="int8")


def test_genai_keeps_float32():
    with pytest.raises(UsageError, match="onnxruntime-genai keeps states in float32"):
        export("tiny-mamba2", format="onnx", target="genai", state_dtype="int8")
