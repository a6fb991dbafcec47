"""One graph in a folder: model.onnx, and its weights in one file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ssmc.runtime.errors import VerificationError

GRAPH, DATA = "model.onnx", "model.onnx.data"


def write_graph(folder: Path, model: ir.Model) -> list[Path]:
    """Write model.onnx and model.onnx.data, tensor by tensor, and check both as ONNX asks for.

    Args:
        folder: exists and holds neither.
        model: its lazy tensors are made one after the other.

    Returns:
        The files.

    Raises:
        VerificationError: the checker of onnx refuses the graph.
    """
    ir.save(model, folder / GRAPH, external_data=DATA)
    check_graph(folder / GRAPH)
    return [folder / GRAPH, folder / DATA]


def check_graph(path: Path) -> None:
    """Run onnx's checker with full shape inference, by path, so that graphs above 2 GB pass as well.

    Raises:
        VerificationError: it refuses the graph.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(
            f"The checker of onnx refuses the graph ({reason}), so nothing was written. This is a bug in ssmc; please "
            "report it."
        ) from error
