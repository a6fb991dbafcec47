"""The whole of `ssmc export --format onnx`: cut, write the graph, check it, run it beside the model, publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.checkpoints import Checkpoint, load_checkpoint, parameter_count
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import new_directory, require_space
from ssmc.runtime.manifest import MANIFEST, file_records, read_manifest, require_keys, write_manifest
from ssmc.runtime.progress import Progress
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from ssmc.runtime.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.versions import versions

from ..runs_where import Runtime
from ..shrink import Shrunk, shrink
from ..verify import Comparison, sample_tokens
from .graph import DTYPES, LOGITS, Settings, build
from .running import open_written
from .verify import Way, prove
from .write import DATA, describe, write_companions, write_graph

FORMAT = "onnx"
RESOLUTION = {"float32": 1.0, "float16": 2.0**13}  # in units of float32's


@dataclass(frozen=True)
class OnnxOptions:
    """What the user may choose about a graph.

    Attributes:
        dtype: of embedding and matrix products, "float32" or "float16" (meant for GPUs).
        logits: "last" or "all".
    """

    dtype: str = "float32"
    logits: str = "last"

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, DTYPES), ("logits", self.logits, LOGITS)):
            if value not in known:
                raise UsageError(f"There is no {name} {value!r} for ONNX. Choose {' or '.join(known)}.")


@dataclass(frozen=True)
class Source:
    """What is exported: a compressed model or a dense one."""

    checkpoint: Checkpoint  # the masked model, or the dense one; float32 in memory
    shrunk: Shrunk
    manifest: dict[str, Any] | None  # of the artefact; a dense model has none


@dataclass(frozen=True)
class OnnxReport:
    """What an export to ONNX found out."""

    source: Source
    directory: Path
    comparison: Comparison
    ways: tuple[Way, ...]
    data_bytes: int  # of the weights as written


def export_onnx(
    directory: str | Path, *, out: str | Path | None, options: OnnxOptions, force: bool, progress: Progress
) -> OnnxReport:
    """Write a model as an ONNX graph with explicit states; nothing appears unless it gives the model's logits.

    Args:
        directory: what `compress` wrote; or a dense model: a folder, a hub id, or "tiny".
        out: folder to write; by default `directory`/onnx, and for a dense model NAME-onnx in the current folder.
        options: see there.
        force: replace an earlier export.
        progress: told what is being done.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    progress("reading the model", 0, 4)
    source = read_source(directory)
    if out is None:
        name = Path(directory).name
        out = Path(f"{name}-onnx") if source.manifest is None else Path(directory).expanduser() / FORMAT
    out = Path(out).expanduser()
    tensors, config = source.shrunk.tensors, source.shrunk.config
    itemsize = 2 if options.dtype == "float16" else 4
    require_space(out, parameter_count(tensors) * itemsize)
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        progress("writing the graph", 1, 4)
        built = build(config, tensors, Settings(options.dtype, options.logits))
        provenance = _provenance(source)
        settings = {"dtype": options.dtype, "logits": options.logits, "target": "portable"}
        has_tokenizer = tokenizer_directory(source.checkpoint) is not None
        built.model.metadata_props.update(describe(built, config, tensors, settings, provenance, has_tokenizer))
        files = write_graph(folder, built.model)
        files += write_companions(folder, source.checkpoint, config)
        progress("running the graph beside the model", 2, 4)
        comparison, ways = _prove(source, folder, RESOLUTION[options.dtype])
        manifest = _manifest(source, comparison, ways, built.layers, settings)
        progress("writing the manifest", 3, 4)
        write_manifest(folder, manifest | {"files": file_records(files)})
        data_bytes = (folder / DATA).stat().st_size
    progress("done", 4, 4)
    return OnnxReport(source, out, comparison, tuple(ways), data_bytes)


def read_source(directory: str | Path) -> Source:
    """Read a compressed model and cut it, or a dense model as it is.

    Raises:
        SsmcError: there is none.
    """
    path = Path(directory).expanduser()
    if not (path / MANIFEST).is_file():
        dense = load_checkpoint(str(directory), dtype=torch.float32)
        return Source(dense, Shrunk(dense.tensors(), dense.config, []), None)
    manifest = read_manifest(path)
    if manifest["kind"] != "masked":
        raise UsageError(f"{directory} is an export already. Name the folder that `ssmc compress` wrote.")
    require_keys(manifest, ("versions", "config", "dimensions", "layers", "removed"), path)
    masked = load_checkpoint(path, dtype=torch.float32)
    return Source(masked, shrink(masked, manifest, path), manifest)


def runs_where(options: OnnxOptions) -> tuple[Runtime, ...]:
    """Which runtimes take the graph."""
    half = options.dtype == "float16"
    cpu = "any sizes; float16 is computed in float32 here" if half else "any sizes; measured"
    return (
        Runtime("onnxruntime, CPU", FORMAT, True, cpu),
        Runtime("onnxruntime, CUDA", FORMAT, True, "standard operators only; not measured"),
    )


def _prove(source: Source, folder: Path, float32_ulps: float) -> tuple[Comparison, list[Way]]:
    checkpoint, stream = source.checkpoint, None
    if tokenizer_directory(checkpoint) is not None:
        stream = tokenize(read_texts(heldout_path()), load_tokenizer(checkpoint))
    tokens = sample_tokens(stream, checkpoint.dimensions.vocab_size)
    return prove(checkpoint.model, open_written(folder), tokens, stream is not None, float32_ulps)


def _provenance(source: Source) -> dict[str, Any]:
    """How the model came about, for the graph and the manifest."""
    if source.manifest is None:
        return {"version": versions()["ssmc"], "model": source.checkpoint.source, "pattern": None, "sparsity": 0.0}
    config = source.manifest["config"]
    run = {key: config[key] for key in ("pattern", "sparsity", "score", "repair")}
    return {"version": versions()["ssmc"], "model": source.manifest["source"]["model"], **run}


def _manifest(
    source: Source,
    comparison: Comparison,
    ways: list[Way],
    layers: tuple[dict[str, int], ...],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    checkpoint, of = source.checkpoint, source.manifest or {}
    shrunk = source.shrunk
    return {
        "kind": "export",
        "format": FORMAT,
        "versions": of.get("versions", versions()),
        "source": of.get("source", {"model": checkpoint.source, "format": checkpoint.format, "relative": None}),
        "config": of.get("config"),
        "dimensions": checkpoint.architecture.dimensions(shrunk.config).as_dict(),
        "layers": list(layers),
        "settings": dict(settings),
        "cuts": [{"name": c.name, "before": list(c.before), "after": list(c.after)} for c in shrunk.cuts],
        "comparison": {
            "max_difference": comparison.max_difference,
            "tolerance": comparison.tolerance,
            "largest_logit": comparison.scale,
            "tokens": comparison.tokens,
            "real_text": comparison.real_text,
            "ways": [asdict(way) for way in ways],
        },
        "parameters": parameter_count(shrunk.tensors),
    }
