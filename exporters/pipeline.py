"""The whole of `ssmc export`: shrink, write, read back, compare, publish."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmc.exporters import sparse24
from ssmc.exporters.cutting import Shrunk, shrink
from ssmc.exporters.formats import check_format
from ssmc.exporters.runtimes import Runtime, runs_where
from ssmc.exporters.sparse24 import Half, Rounding, Sparse24Module
from ssmc.exporters.verify import Comparison, compare, cut_epsilons, sample_tokens
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import new_directory, require_space
from ssmc.runtime.manifest import MANIFEST, file_records, read_manifest, require_keys, write_manifest
from ssmc.runtime.models.checkpoints import (
    Checkpoint,
    load_checkpoint,
    parameter_count,
    tensor_bytes,
    write_checkpoint,
)
from ssmc.runtime.models.checkpoints.packed_format import pack_tensors
from ssmc.runtime.models.families import Cut
from ssmc.runtime.models.tokenizers import copy_tokenizer, has_tokenizer, load_tokenizer
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

if TYPE_CHECKING:
    from ssmc.exporters.onnx import OnnxReport

CHECKPOINTS = {"safetensors": "transformers", "mamba-ssm": "mamba-ssm", sparse24.FORMAT: "transformers"}
"""Export format, as the user names it -> checkpoint format, as `write_checkpoint` names it."""

ONNX = "onnx"
FORMATS = (*CHECKPOINTS, ONNX)


@dataclass(frozen=True)
class ExportResult:
    """What `export` did."""

    directory: Path
    cuts: tuple[Cut, ...]
    comparison: Comparison
    runs_where: tuple[Runtime, ...]
    parameters: tuple[int, int]  # masked, shrunk
    weight_bytes: tuple[int, int]  # of all tensors, masked and as written
    modules: tuple[Sparse24Module, ...] = ()  # that are 2:4, of the format sparse24
    rounding: Rounding | None = None  # what half precision changed, of the format sparse24
    onnx: OnnxReport | None = None  # of the format onnx


def export(
    directory: str | Path = "ssmc-out",
    *,
    format: str = "safetensors",
    out: str | Path | None = None,
    dtype: str | None = None,
    packed: bool = False,
    logits: str | None = None,
    quantize: str | None = None,
    target: str | None = None,
    text: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Write a compressed model in a format others load, physically smaller.

    Nothing appears unless the written files, read back, give the masked model's logits.

    Args:
        directory: what `compress` wrote. The format onnx takes dense models as well: a folder, a hub id, or "tiny".
        format: "safetensors" (transformers' layout), "mamba-ssm" (its own), "sparse24" (transformers' layout in half
            precision with a list of the modules that are 2:4), or "onnx" (a graph with explicit states).
        out: folder to write; by default one named after the format inside `directory`, or NAME-onnx for a dense model.
        dtype: of sparse24: "float16" or "bfloat16"; by default the model's own if that is one of them, else bfloat16.
            Of onnx: "float32" (default) or "float16".
        packed: of sparse24: store 2:4 matrices in 9/16 of their space, which only ssmc reads.
        logits: of onnx: those of the "last" token (default) or of "all".
        quantize: of onnx: "int8" for the large matrices, None for none.
        target: of onnx: "portable" (default), standard operators only, or "ort", onnxruntime's own too (Mamba-2 only).
        text: of onnx: held-out text for the perplexity before and after float16 or int8.
        force: replace an earlier export.
        progress: told what is being done.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    if format not in FORMATS:
        raise UsageError(f"There is no export format {format!r}; there are {', '.join(FORMATS)}.")
    onnx = {"logits": logits, "quantize": quantize, "target": target, "text": text}
    if format == ONNX:
        return _export_onnx(directory, out, onnx | {"dtype": dtype}, packed, force, progress)
    if any(value is not None for value in onnx.values()):
        raise UsageError(f"{', '.join(onnx)} are options of the format {ONNX}, not of {format}.")
    sparse24.check_options(format, dtype, packed)
    directory = Path(directory).expanduser()
    manifest = read_manifest(directory)
    if manifest["kind"] != "masked":
        raise UsageError(f"{directory} is an export already. Name the folder that `ssmc compress` wrote.")
    require_keys(manifest, ("versions", "config", "dimensions", "layers", "removed"), directory)
    layout = sparse24.PACKED if packed else CHECKPOINTS[format]
    out = directory / (sparse24.PACKED if packed else format) if out is None else Path(out).expanduser()
    progress("reading the masked model", 0, 4)
    masked = load_checkpoint(directory, dtype=torch.float32)
    check_format(format, masked.architecture.model_type, masked.architecture.is_hybrid)
    progress("cutting", 1, 4)
    shrunk, half = shrink(masked, manifest, directory), None
    if format == sparse24.FORMAT:
        shrunk, half = sparse24.round_to_half(shrunk, masked, manifest, directory, dtype)
    require_space(out, tensor_bytes(shrunk.tensors))
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        progress("writing", 2, 4)
        files = write_checkpoint(folder, shrunk.tensors, _with_provenance(shrunk.config, manifest), format=layout)
        if has_tokenizer(directory):
            files += copy_tokenizer(directory, folder)
        progress("comparing with the masked model", 3, 4)
        comparison, rounding = _compare(masked, folder, directory, half)
        content = _manifest(manifest, format, masked, shrunk, comparison, files)
        write_manifest(folder, content | ({} if half is None else sparse24.section(half, rounding, packed)))
    progress("done", 4, 4)
    before = masked.tensors()
    sizes, family = masked.architecture.dimensions(shrunk.config), masked.architecture.model_type
    runtimes = runs_where(sizes, manifest["dimensions"]["d_state"], family)
    return ExportResult(
        directory=out,
        cuts=tuple(shrunk.cuts),
        comparison=comparison,
        runs_where=tuple(runtimes if half is None else sparse24.where_it_runs(runtimes, packed)),
        parameters=(parameter_count(before), parameter_count(shrunk.tensors)),
        weight_bytes=(tensor_bytes(before), tensor_bytes(pack_tensors(shrunk.tensors) if packed else shrunk.tensors)),
        modules=() if half is None else half.modules,
        rounding=rounding,
    )


def _export_onnx(
    directory: str | Path,
    out: str | Path | None,
    options: dict[str, str | None],
    packed: bool,
    force: bool,
    progress: Progress,
) -> ExportResult:
    """The format onnx, whose packages are imported only now: they may be missing."""
    if packed:
        raise UsageError(f"packed is an option of the format {sparse24.FORMAT}.")
    try:
        from ssmc.exporters.onnx import OnnxOptions, export_onnx, runs_where
    except ImportError as error:
        raise UsageError(f"The format {ONNX} needs {error.name}: pip install 'ssmc[onnx]'.") from error
    chosen = OnnxOptions(**{name: value for name, value in options.items() if value is not None})
    report = export_onnx(directory, out=out, options=chosen, force=force, progress=progress)
    before, after = report.source.checkpoint.tensors(), report.source.shrunk.tensors
    return ExportResult(
        directory=report.directory,
        cuts=tuple(report.source.shrunk.cuts),
        comparison=report.comparison,
        runs_where=runs_where(chosen),
        parameters=(parameter_count(before), parameter_count(after)),
        weight_bytes=(tensor_bytes(before), report.data_bytes),
        onnx=report,
    )


def _compare(
    masked: Checkpoint, written: Path, directory: Path, half: Half | None
) -> tuple[Comparison, Rounding | None]:
    """Read the export back from its files and run it against the masked model on real text."""
    stream = None
    if has_tokenizer(directory):
        stream = tokenize(read_texts(heldout_path()), load_tokenizer(masked))
    shrunk = load_checkpoint(written, dtype=torch.float32)
    tokens = sample_tokens(stream, masked.dimensions.vocab_size)
    moved = cut_epsilons(masked, shrunk.config, tokens)
    if half is not None:
        return sparse24.compare_half(masked, shrunk, half, tokens, real_text=stream is not None)
    comparison = compare(masked.model, shrunk.model, tokens, real_text=stream is not None)
    return replace(comparison, epsilon_difference=moved), None


def _with_provenance(config: Any, manifest: dict[str, Any]) -> Any:
    """Note in config.json how the model was made; transformers keeps keys it does not know."""
    run = {key: manifest["config"][key] for key in ("pattern", "sparsity", "score", "repair")}
    config.ssmc = {"version": manifest["versions"]["ssmc"], **run}
    return config


def _manifest(
    masked_manifest: dict[str, Any],
    format: str,
    masked: Checkpoint,
    shrunk: Shrunk,
    comparison: Comparison,
    files: list[Path],
) -> dict[str, Any]:
    return {
        "kind": "export",
        "format": format,
        "versions": masked_manifest["versions"],
        "source": masked_manifest["source"],
        "config": masked_manifest["config"],
        "dimensions": masked.architecture.dimensions(shrunk.config).as_dict(),
        "cuts": [{"name": c.name, "before": list(c.before), "after": list(c.after)} for c in shrunk.cuts],
        "comparison": {
            "max_difference": comparison.max_difference,
            "tolerance": comparison.tolerance,
            "largest_logit": comparison.scale,
            "tokens": comparison.tokens,
            "real_text": comparison.real_text,
            "epsilon_difference": comparison.epsilon_difference,
        },
        "parameters": parameter_count(shrunk.tensors),
        "files": file_records(files),
    }
