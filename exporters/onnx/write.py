"""Write a graph into a folder: model.onnx, its weights in one file beside it, configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.tokenizers import copy_tokenizer, tokenizer_directory

GRAPH, DATA = "model.onnx", "model.onnx.data"
KEY = "ssmc."  # of our metadata in a graph


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


def write_companions(folder: Path, source: Checkpoint, config: Any) -> list[Path]:
    """Write config.json and, where there is one, the tokenizer.

    Returns:
        The files.
    """
    files = [folder / "config.json"]
    files[0].write_text(config.to_json_string(use_diff=True), encoding="utf-8", newline="\n")
    generation = source.directory / "generation_config.json"
    if generation.is_file():
        files.append(folder / generation.name)
        files[-1].write_bytes(generation.read_bytes())
    tokenizer = tokenizer_directory(source)
    return files if tokenizer is None else files + copy_tokenizer(tokenizer, folder)


def metadata(model: ir.Model, about: Mapping[str, Any]) -> dict[str, str]:
    """What a graph says about itself, so that it can be run without any other file: our keys, values in JSON.

    Args:
        model: the graph, for the layouts of its inputs and outputs.
        about: what the manifest says.
    """
    layouts = {
        value.name: {"shape": [_dim(d) for d in value.shape], "dtype": str(value.dtype.numpy())}
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    run = about["config"] or {}
    provenance = {key: run.get(key) for key in ("pattern", "sparsity", "score", "repair")}
    content = (
        about["onnx"]
        | about["settings"]
        | {
            "version": about["versions"]["ssmc"],
            "dimensions": about["dimensions"],
            "parameters": about["parameters"],
            "layouts": layouts,
            "states": "zeros before the first token; present_* goes in again as past_*; channels last, the newest "
            "input of the convolution at the end",
            "provenance": {"model": about["source"]["model"], **provenance},
        }
    )
    return {KEY + key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}


def _dim(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else dim.value
