"""Write the graphs of one export, with what they say about themselves, and the configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ssmc.exporters.format import Job
from ssmc.exporters.onnx.files import write_graph
from ssmc.exporters.onnx.genai import write_genai_config
from ssmc.exporters.onnx.graph import Settings, build, require_family
from ssmc.exporters.onnx.layers import GENAI
from ssmc.exporters.onnx.quantize import quantize_int8
from ssmc.runtime.models.checkpoints import parameter_count
from ssmc.runtime.models.checkpoints.transformers_format import write_config
from ssmc.runtime.versions import versions

ON_THE_WAY = _FLOAT, _STATES, _INT8 = (
    ".float32",
    ".states",
    ".int8",
)  # folders for graphs that are gone before the result appears
INT8, CODES = "int8", "codes"  # ways to quantise
KEY = "ssmc."  # of our metadata in a graph


def write_all(job: Job, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write the graph a user asked for, the float32 one that is proven if that is lossy, and config.json.

    Args:
        job: what is exported.
        folder: exists and is empty.
        about: settings and sizes of the graph.

    Returns:
        The files that stay.
    """
    shrunk, options = job.shrunk, job.options
    settings = Settings(logits=options.logits, target=options.target, own_head=options.quantize == INT8)
    first = proven_folder(job, folder)
    first.mkdir(exist_ok=True)
    built = build(shrunk.config, shrunk.tensors, settings, job.extra).model
    known = metadata(built, job, about)
    built.metadata_props.update(known)
    files = write_graph(first, built)
    if options.lossy:
        last = replace(settings, dtype=options.dtype, state_dtype=options.state_dtype)
        if options.quantize == CODES:
            rounding = replace(last, rounds_inputs=options.activations != last.dtype)
            final = build(shrunk.config, shrunk.tensors, rounding, job.extra).model
        elif options.quantize:
            if options.state_dtype != settings.state_dtype:
                first = folder / _STATES
                first.mkdir()
                write_graph(first, build(shrunk.config, shrunk.tensors, last).model)
            (folder / _INT8).mkdir()
            family = require_family(shrunk.config, options.target)
            final = quantize_int8(first, folder / _INT8, (family.embedding, family.head))
        else:
            final = build(shrunk.config, shrunk.tensors, last).model
        final.metadata_props.update(known)
        files = write_graph(folder, final)
    stored = job.source.checkpoint.stored_config
    if options.target == GENAI:
        files.append(write_genai_config(folder, job))
    return [*files, write_config(folder / "config.json", shrunk.tensors, shrunk.config, stored)]


def proven_folder(job: Job, folder: Path) -> Path:
    """Where the float32 graph lies while `folder` is being filled."""
    return folder / _FLOAT if job.options.lossy else folder


def metadata(model: ir.Model, job: Job, about: Mapping[str, Any]) -> dict[str, str]:
    """What a graph says about itself, so that it can be run without any other file: our keys, values in JSON.

    Args:
        model: the graph, for the layouts of its inputs and outputs.
        job: what it was made from.
        about: its settings and sizes.
    """
    layouts = {
        value.name: {"shape": [_dim(d) for d in value.shape], "dtype": str(value.dtype.numpy())}
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    source, shrunk = job.source, job.shrunk
    run = {} if source.manifest is None else source.manifest.config
    provenance = {key: run.get(key) for key in ("pattern", "sparsity", "score", "repair")}
    content = (
        about["onnx"]
        | about["settings"]
        | {
            "version": versions()["ssmc"],
            "dimensions": source.checkpoint.architecture.dimensions(shrunk.config).as_dict(),
            "parameters": parameter_count(shrunk.tensors),
            "layouts": layouts,
            "states": "zeros before the first token; present_* goes in again as past_*; channels last, the newest "
            "input of the convolution at the end",
            "provenance": {"model": source.origin.model, **provenance},
        }
    )
    return {KEY + key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}


def _dim(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else dim.value
