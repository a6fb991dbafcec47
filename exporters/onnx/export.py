"""The whole of `ssmc export --format onnx`: cut, write the graph, check it, run it beside the model, publish."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssmc.exporters.cutting import Shrunk, shrink
from ssmc.exporters.onnx.graph import DTYPES, LAYERS, LOGITS, Settings, build, require_family
from ssmc.exporters.onnx.quality import Quality, measure
from ssmc.exporters.onnx.quantize import quantize_int8
from ssmc.exporters.onnx.running import open_written
from ssmc.exporters.onnx.verify import Way, differences, prove
from ssmc.exporters.onnx.write import DATA, metadata, write_companions, write_graph
from ssmc.exporters.runtimes import Runtime
from ssmc.exporters.verify import Comparison, cut_epsilons, sample_tokens
from ssmc.runtime.errors import UsageError
from ssmc.runtime.files import new_directory, refuse_existing, require_space
from ssmc.runtime.manifest import MANIFEST, file_records, read_manifest, require_keys, write_manifest
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint, parameter_count
from ssmc.runtime.models.tokenizers import TOKENIZER_JSON, load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import Progress
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from ssmc.runtime.versions import versions

FORMAT = "onnx"
QUANTIZE = ("int8",)
TARGETS = ("portable", "ort")
RANDOM = 4096  # tokens that stand for text where there is no tokenizer
_FLOAT, _INT8 = ".float32", ".int8"  # folders for graphs on the way, gone before the result appears


@dataclass(frozen=True)
class OnnxOptions:
    """What the user may choose about a graph.

    Attributes:
        dtype: of embedding and matrix products, "float32" or "float16" (meant for GPUs).
        quantize: "int8" or None.
        logits: "last" or "all".
        target: "portable": standard operators only, of which onnxruntime fuses what it can when it loads them; "ort":
            operators of its own too, for families that they were measured to help.
        text: held-out text for the perplexity before and after float16 or int8, as `read_texts` takes it; None: the
            embedded stories.
    """

    dtype: str = "float32"
    quantize: str | None = None
    logits: str = "last"
    target: str = "portable"
    text: str | None = None

    def __post_init__(self) -> None:
        known = {"dtype": DTYPES, "logits": LOGITS, "quantize": (None, *QUANTIZE), "target": TARGETS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                words = " or ".join(value for value in values if value)
                raise UsageError(f"There is no {name} {getattr(self, name)!r} for ONNX. Choose {words}.")
        if self.quantize and self.dtype != "float32":
            raise UsageError(f"{self.quantize} goes with float32: what is not quantised stays so. Leave out --dtype.")

    @property
    def lossy(self) -> bool:
        """Whether the graph computes something else than float32."""
        return self.quantize is not None or self.dtype != "float32"


@dataclass(frozen=True)
class Source:
    """What is exported: a compressed model or a dense one."""

    checkpoint: Checkpoint  # the masked model, or the dense one; float32 in memory
    shrunk: Shrunk
    manifest: dict[str, Any] | None  # of the artefact; a dense model has none


@dataclass(frozen=True)
class OnnxReport:
    """What an export to ONNX found out.

    Attributes:
        source: what was exported.
        directory: where it is.
        comparison: the float32 graph beside the model, the largest difference of all ways.
        ways: the ways one by one.
        rounding: the same of the float16 or int8 graph; empty for a float32 one.
        quality: perplexity before and after float16 or int8; None for a float32 graph.
        data_bytes: of the weights as written.
    """

    source: Source
    directory: Path
    comparison: Comparison
    ways: tuple[Way, ...]
    rounding: tuple[Way, ...]
    quality: Quality | None
    data_bytes: int


def export_onnx(
    directory: str | Path, *, out: str | Path | None, options: OnnxOptions, force: bool, progress: Progress
) -> OnnxReport:
    """Write a model as an ONNX graph with explicit states; nothing appears unless it gives the model's logits.

    The graph is proven in float32, whatever is published; what float16 or int8 change is measured on text.

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
    require_family(source.shrunk.config, options.target)
    if out is None:
        name = Path(directory).name
        out = Path(f"{name}-onnx") if source.manifest is None else Path(directory).expanduser() / FORMAT
    out = Path(out).expanduser()
    refuse_existing(out, force=force, marker=MANIFEST)
    tokens = _tokens(source.checkpoint, options.text)
    require_space(out, parameter_count(source.shrunk.tensors) * (9 if options.lossy else 4))
    with new_directory(out, force=force, marker=MANIFEST) as folder:
        about = _about(source, options)
        moved = cut_epsilons(source.checkpoint, source.shrunk.config, tokens.sample)
        comparison, ways, files = _write_proven(source, folder, options, tokens, about, progress)
        comparison = replace(comparison, epsilon_difference=moved)
        rounding, quality = [], None
        if options.lossy:
            progress("measuring what rounding changes", 2, 4)
            rounding = differences(source.checkpoint.model, open_written(folder), tokens.sample)
            quality = measure(source.checkpoint.model, folder, tokens.stream, tokens.source, progress)
        progress("writing the manifest", 3, 4)
        files += write_companions(folder, source.checkpoint, source.shrunk.config)
        content = about | _results(comparison, ways, rounding, quality) | {"files": file_records(files)}
        write_manifest(folder, content)
        data_bytes = (folder / DATA).stat().st_size
    progress("done", 4, 4)
    return OnnxReport(source, out, comparison, tuple(ways), tuple(rounding), quality, data_bytes)


def _write_proven(
    source: Source, folder: Path, options: OnnxOptions, tokens: Tokens, about: dict[str, Any], progress: Progress
) -> tuple[Comparison, list[Way], list[Path]]:
    """Write the graph of `options`, and prove it in float32: a graph of its own, for the time being, if it is lossy."""
    tensors, config, model = source.shrunk.tensors, source.shrunk.config, source.checkpoint.model
    first = folder / _FLOAT if options.lossy else folder
    first.mkdir(exist_ok=True)
    progress("writing the graph", 1, 4)
    built = build(config, tensors, _settings(options, own_head=options.quantize is not None))
    built.model.metadata_props.update(metadata(built.model, about))
    files = write_graph(first, built.model)
    progress("running the graph beside the model", 2, 4)
    comparison, ways = prove(model, open_written(first), tokens.sample, tokens.real)
    if options.lossy:
        if options.quantize:
            (folder / _INT8).mkdir()
            final = quantize_int8(first, folder / _INT8)
        else:
            final = build(config, tensors, _settings(options, dtype=options.dtype)).model
        final.metadata_props.update(metadata(built.model, about))
        files = write_graph(folder, final)
        for name in (_FLOAT, _INT8):
            shutil.rmtree(folder / name, ignore_errors=True)
    return comparison, ways, files


def _settings(options: OnnxOptions, **changes: Any) -> Settings:
    return Settings(logits=options.logits, target=options.target, **changes)


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
    return Source(masked, shrink(masked, manifest, path, uneven=True), manifest)


def runs_where(options: OnnxOptions) -> tuple[Runtime, ...]:
    """Which runtimes take the graph."""
    half = options.dtype == "float16"
    cpu = "any sizes; computed in float32, float16 saves no time here" if half else "any sizes"
    operators = "standard operators only"
    if options.target == "ort":
        operators = "needs its own LinearAttention, tested with 1.32"
        cpu += "; " + operators
    return (
        Runtime("onnxruntime, CPU", FORMAT, True, cpu),
        Runtime("onnxruntime, CUDA", FORMAT, True, operators + "; not measured"),
    )


@dataclass(frozen=True)
class Tokens:
    """What graph and model are run on."""

    sample: torch.Tensor  # (B, L), for logits
    stream: torch.Tensor  # (T,), for perplexity
    source: str
    real: bool  # text, not random


def _tokens(checkpoint: Checkpoint, text: str | None) -> Tokens:
    """Text, where the model has a tokenizer; otherwise random tokens."""
    vocab_size = checkpoint.dimensions.vocab_size
    if tokenizer_directory(checkpoint) is None:
        if text is not None:
            raise UsageError(f"{checkpoint.source} comes without a tokenizer, so {text} cannot be read.")
        stream = torch.randint(vocab_size, (RANDOM,), generator=torch.Generator().manual_seed(0))
        return Tokens(sample_tokens(None, vocab_size), stream, "random tokens", False)
    stream = tokenize(read_texts(heldout_path() if text is None else text), load_tokenizer(checkpoint))
    return Tokens(sample_tokens(stream, vocab_size), stream, "the embedded stories" if text is None else text, True)


def _about(source: Source, options: OnnxOptions) -> dict[str, Any]:
    """What is known of the export before it is written, for the manifest and the graph."""
    checkpoint, shrunk, of = source.checkpoint, source.shrunk, source.manifest or {}
    dense = {"model": checkpoint.source, "format": checkpoint.format, "relative": None}
    layers = [
        LAYERS[shrunk.config.model_type].sizes(shrunk.config, shrunk.tensors, i)
        for i in range(shrunk.config.num_hidden_layers)
    ]
    return {
        "kind": "export",
        "format": FORMAT,
        "versions": of.get("versions", versions()),
        "source": of.get("source", dense),
        "config": of.get("config"),
        "dimensions": checkpoint.architecture.dimensions(shrunk.config).as_dict(),
        "settings": {
            "dtype": options.dtype,
            "quantize": options.quantize,
            "logits": options.logits,
            "target": options.target,
        },
        "onnx": {
            "architecture": shrunk.config.model_type,
            "layers": layers,
            "tokenizer": TOKENIZER_JSON if tokenizer_directory(checkpoint) is not None else None,
        },
        "cuts": [{"name": c.name, "before": list(c.before), "after": list(c.after)} for c in shrunk.cuts],
        "parameters": parameter_count(shrunk.tensors),
    }


def _results(comparison: Comparison, ways: list[Way], rounding: list[Way], quality: Quality | None) -> dict[str, Any]:
    return {
        "comparison": {
            "max_difference": comparison.max_difference,
            "tolerance": comparison.tolerance,
            "largest_logit": comparison.scale,
            "tokens": comparison.tokens,
            "real_text": comparison.real_text,
            "epsilon_difference": comparison.epsilon_difference,
            "ways": [asdict(way) for way in ways],
        },
        "rounding": [asdict(way) for way in rounding],
        "perplexity": None if quality is None else asdict(quality),
    }
