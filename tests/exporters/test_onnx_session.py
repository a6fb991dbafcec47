"""The ONNX session: a small graph against numpy, its buffers, and everything that can be wrong with a folder."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ssmc.exporters import export as ssmc_export
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.manifest import ExportManifest, Origin, file_records, write_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.generation import OnnxSession, generate, open_session, stream_tokens
from ssmc.runtime.models.generation.onnx_graph import is_onnx_export, open_graph
from ssmc.runtime.models.generation.session import pad_left
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support import graphs
from tests.support.commandline import run
from tests.support.models import random_mamba2, random_model

TOKENS = np.random.default_rng(1).integers(0, graphs.V, (3, 20))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=["last", "all"])
def session(request, tmp_path_factory):
    folder = graphs.save(tmp_path_factory.mktemp("export") / "onnx", graphs.model(request.param == "all"))
    return OnnxSession(open_graph(folder, "cpu"))


@pytest.fixture
def export(tmp_path):
    """A folder as `ssmc export` leaves it, to damage."""
    folder = graphs.save(tmp_path / "onnx")
    write_manifest(folder, ExportManifest(Origin(), "onnx", files=file_records(folder.iterdir())))
    return folder


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(7,), (1, 6), (3, 2, 2)])
def test_prefill_in_pieces_and_steps_follow_the_recurrence(session, pieces):
    wanted = graphs.naive_logits(TOKENS)
    session.reset()
    read = 0
    for piece in pieces:
        got = session.prefill(TOKENS[:, read : read + piece])
        read += piece
        np.testing.assert_allclose(got, wanted[:, read - 1], **CLOSE)
    for position in range(read, 15):
        np.testing.assert_allclose(session.step(TOKENS[:, position]), wanted[:, position], **CLOSE)
    np.testing.assert_allclose(session.prefill(TOKENS[:, 15:]), wanted[:, -1], **CLOSE)


@pytest.mark.parametrize("most", [1, 6, 100])
def test_logits_of_all_positions_come_in_pieces(session, most):
    session.reset()
    session.prefill([[1, 2]])  # something to forget
    pieces = [piece.clone() for piece in session.pieces(torch.tensor(TOKENS), most)]
    np.testing.assert_allclose(torch.cat(pieces, dim=1), graphs.naive_logits(TOKENS), **CLOSE)
    assert max(piece.shape[1] for piece in pieces) <= most


def test_padded_prompts_are_what_each_is_alone(session):
    prompts = [[5, 8, 13, 21], [3], [1, 2]]
    session.reset()
    first = session.prefill(*pad_left(prompts)).clone()
    then = session.step([4, 5, 6])
    for row, (prompt, following) in enumerate(zip(prompts, [4, 5, 6], strict=True)):
        wanted = graphs.naive_logits(np.array([[*prompt, following]]))[0]
        np.testing.assert_allclose(first[row], wanted[-2], **CLOSE)
        np.testing.assert_allclose(then[row], wanted[-1], **CLOSE)


def test_a_long_prompt_is_read_in_pieces_where_all_logits_would_be_too_many(session, monkeypatch):
    # two tokens of three
    monkeypatch.setattr(
        "ssmc.runtime.models.generation.onnx_session.LOGITS_AT_ONCE", 2 * 3 * graphs.V
    )  # two tokens of three
    lengths = []
    read = session._read
    monkeypatch.setattr(session, "_read", lambda tokens, mask: (lengths.append(tokens.shape[1]), read(tokens, mask))[1])
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :1].tolist(), TOKENS[2, :4].tolist()]
    session.reset()
    got = session.prefill(*pad_left(prompts))
    assert lengths == ([2, 2, 1] if session.graph.all_logits else [5])
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row], graphs.naive_logits(np.array([prompt]))[0, -1], **CLOSE)


def test_greedy_generation_follows_the_recurrence(session):
    tokens = [4, 9]
    for _ in range(12):
        tokens.append(int(graphs.naive_logits(np.array([tokens]))[0, -1].argmax()))
    assert [row[0] for row in stream_tokens(session, [tokens[:2]], max_new_tokens=12)] == tokens[2:]


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_no_buffer_is_made_or_copied_after_the_first_call(session, monkeypatch):
    session.reset()
    session.prefill(TOKENS[:, :3])
    before = session.buffers()
    bound = [tensor.data_ptr() for side in session._states for tensor in side]
    assert len(set(bound)) == 2 * 2 * len(graphs.SIZES)  # two sets, conv and ssm of every layer
    monkeypatch.setattr(session.graph.session, "io_binding", None)  # a step makes no binding either
    logits = set()
    for position in range(3, 9):
        pasts, presents = ([t.data_ptr() for t in side] for side in session._states)
        logits.add(session.step(TOKENS[:, position]).data_ptr())
        assert [t.data_ptr() for t in session._states[0]] == presents  # what was written is what is read next
        assert [t.data_ptr() for t in session._states[1]] == pasts
    monkeypatch.undo()
    session.reset()
    session.prefill(TOKENS[:, :5])
    assert session.buffers() == before  # not by a reset, and not by a prompt of another length
    assert len(logits) == 1


def test_onnxruntime_itself_gives_back_the_bound_buffers(session):
    session.reset()
    session.prefill(TOKENS[:, :3])
    binding, presents = session._steps[0], [t.data_ptr() for t in session._states[1]]
    session.step(TOKENS[:, 3])
    addresses = [value.data_ptr() for value in binding.get_outputs()]
    assert set(presents) <= set(addresses)


def test_another_batch_needs_a_reset(session):
    session.reset()
    session.prefill([[1, 2]])
    with pytest.raises(UsageError, match="reset"):
        session.prefill([[1], [2]])
    session.reset()
    np.testing.assert_allclose(session.prefill([[1], [2]])[1], graphs.naive_logits(np.array([[2]]))[0, 0], **CLOSE)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_the_folder_of_an_export_is_known(export, tmp_path):
    assert is_onnx_export(export)
    (export / "model.onnx").unlink()
    assert is_onnx_export(export)  # what is left of one
    assert not is_onnx_export(TINY_DIRECTORY)
    assert not is_onnx_export(tmp_path / "nowhere")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize(
    ("damage", "said"), [(lambda p: p.unlink(), "missing|holds no"), (truncate, "damaged"), (flip, "damaged")]
)
def test_damaged_or_missing_files(export, name, damage, said):
    damage(export / name)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_session(export)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), truncate, lambda p: p.write_bytes(b"")])
def test_damage_that_no_manifest_tells_of(export, name, damage):
    (export / "ssmc.json").unlink()
    damage(export / name)
    with pytest.raises(CheckpointError, match=r"model\.onnx|config\.json") as caught:
        open_graph(export)
    assert "\n" not in str(caught.value)


def without(made, name):
    for values in (made.graph.input, made.graph.output):
        for value in [v for v in values if v.name == name]:
            values.remove(value)
    return made


def with_input(made, name):
    made.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]))
    return made


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: without(m, "present_ssm_1"), "no output present_ssm_1"),
        (lambda m: without(m, "logits"), "no output logits"),
        (lambda m: with_input(m, "position_ids"), "an input position_ids"),
        (lambda m: with_input(m, "past_key_0"), "no output present_key_0"),
    ],
)
def test_another_kind_of_graph(tmp_path, change, named):
    folder = tmp_path / "onnx"
    folder.mkdir()
    onnx.save(change(graphs.model()), folder / "model.onnx")
    with pytest.raises(CheckpointError, match=named):
        open_graph(folder)


def test_a_graph_of_something_else(tmp_path):
    square = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["y"])],
        "square",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    onnx.save(helper.make_model(square, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="no input attention_mask, input_ids"):
        open_graph(tmp_path)


def test_onnxruntime_missing_or_without_cuda(export, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UsageError, match="no CUDA provider"):
        open_session(export, device="cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"ssmc\[onnx\]"):
        open_session(export)


def test_a_dtype_is_refused_and_so_is_an_unknown_device(export):
    with pytest.raises(UsageError, match="dtype"):
        open_session(export, dtype=torch.float16)
    with pytest.raises(UsageError, match="abacus"):
        open_session(export, device="abacus")


def test_without_a_tokenizer_it_runs_but_writes_no_text(export):
    loaded = open_session(export)
    assert loaded.tokenizer is None
    assert loaded.stop_tokens == (0,)  # config.json's
    assert loaded.session.prefill([[1, 2]]).shape == (1, graphs.V)
    with pytest.raises(CheckpointError, match="--tokenizer"):
        generate(loaded, "x")


def test_a_tokenizer_of_another_model_is_refused(export):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_DIRECTORY / name, export / name)
    with pytest.raises(CheckpointError, match="4095"):
        open_session(export)


def test_the_command_says_what_is_wrong(capsys, export):
    assert "--tokenizer" in run(capsys, "generate", export, "x").sentence(3)
    (export / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in run(capsys, "generate", export, "x").sentence(3)
    (export / "model.onnx").unlink()
    assert "model.onnx" in run(capsys, "generate", export, "x").sentence(3)


@pytest.mark.parametrize("make", [random_model, random_mamba2])
def test_a_convolution_of_one_tap(make, tmp_path):
    """It remembers nothing, so its state has no numbers, which no address can be given for."""
    make(conv_kernel=1).save_pretrained(tmp_path / "model")
    ssmc_export(tmp_path / "model", format="onnx", out=tmp_path / "onnx")
    stock = load_checkpoint(tmp_path / "model", dtype=torch.float32).model
    session = open_session(tmp_path / "onnx").session
    tokens = torch.tensor([[5, 8, 13, 21], [1, 2, 3, 4]])
    session.prefill(tokens[:, :2])
    session.step(tokens[:, 2])
    found = session.step(tokens[:, 3])
    with torch.no_grad():
        torch.testing.assert_close(found, stock(tokens, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4)
