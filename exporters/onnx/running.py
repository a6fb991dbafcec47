"""Run a graph that was just written, with plain arrays; `ssmc.runtime.models.generation` has the sessions for users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ssmc.exporters.onnx.files import GRAPH
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.generation.onnx_graph import MASK, TYPES, reason
from ssmc.runtime.models.generation.onnx_logits import give_all_logits
from ssmc.runtime.models.generation.onnx_names import TOTAL, present_name

PROVIDERS = ("CPUExecutionProvider",)
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_written(folder: Path, *, all_logits: bool = False) -> onnxruntime.InferenceSession:
    """Load a graph from its folder; with `all_logits`, let it give those of every token, whatever it was made for.

    Raises:
        VerificationError: this onnxruntime does not take the graph, for want of an operator perhaps.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    if not all_logits:
        return _open(folder / GRAPH, options)
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.resolve()))
    model = give_all_logits(onnx.load(folder / GRAPH, load_external_data=False))
    return _open(model.SerializeToString(), options)


def _open(graph: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(graph, options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime has a dozen classes of its own, all direct children of Exception
        raise VerificationError(
            f"onnxruntime {onnxruntime.__version__} cannot load the graph ({reason(error)}), so nothing was written. "
            "Take a newer onnxruntime, or the target portable."
        ) from error


def fresh_states(session: onnxruntime.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    """The states before the first token by the names of their inputs: zeros, (B, ...); what grows is empty.

    Of a graph that is told at every call which of all tokens are real, that is among them.
    """
    fresh = {}
    for past in (value for value in session.get_inputs() if value.name.startswith("past_")):
        sizes = (size if isinstance(size, int) else 0 for size in past.shape[1:])
        fresh[past.name] = np.zeros((batch, *sizes), TYPES[past.type][1])
    if any(value.name == MASK and value.shape[1] == TOTAL for value in session.get_inputs()):
        fresh[MASK] = np.zeros((batch, 0), np.int64)
    return fresh


def run(
    session: onnxruntime.InferenceSession,
    ids: np.ndarray,
    states: dict[str, np.ndarray],
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read (B, L) tokens from `states` on.

    Args:
        session: of the graph.
        ids: (B, L) int64.
        states: before them.
        mask: (B, L) int64, 1 at tokens and 0 at padding; None: nothing is padded.

    Returns:
        Logits, (B, 1, V) or (B, L, V) as the graph gives them, and the states after the tokens.
    """
    mask = np.ones_like(ids) if mask is None else mask
    pasts = {name: state for name, state in states.items() if name != MASK}
    mask = np.concatenate([states[MASK], mask], axis=1) if MASK in states else mask
    presents = [present_name(name) for name in pasts]
    logits, *new = session.run(["logits", *presents], {"input_ids": ids, MASK: mask, **pasts})
    told = {MASK: mask} if MASK in states else {}
    return logits, dict(zip(pasts, new, strict=True)) | told
