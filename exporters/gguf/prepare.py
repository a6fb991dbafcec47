"""From a job of the export pipeline to one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssmc.exporters.format import Job
from ssmc.exporters.gguf.codes import CODES, with_scales
from ssmc.exporters.gguf.layouts import LAYOUTS, architecture_name
from ssmc.exporters.gguf.vocabulary import Vocabulary, read_vocabulary
from ssmc.exporters.gguf.write import FILE, write_file
from ssmc.exporters.quantized import require_codes
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.quantized import Quantized


@dataclass(frozen=True)
class Prepared:
    """What is known before writing.

    Attributes:
        layout: of the family.
        vocabulary: of the model.
        sizes: of the smaller model.
        codes: weights that are written in few bits, by their names.
    """

    layout: Any
    vocabulary: Vocabulary
    sizes: Any
    codes: Mapping[str, Quantized] = field(default_factory=dict)


def prepare(job: Job) -> Job:
    """Refuse what llama.cpp cannot compute, and read the tokenizer.

    Raises:
        UsageError: with the reason.
    """
    source = job.source
    layout, sizes = _layout(source.checkpoint.architecture, job.shrunk.config)
    if source.tokenizer is None:
        raise UsageError(
            f"{source.checkpoint.source} comes without a tokenizer, which llama.cpp cannot do without. Put its "
            "tokenizer.json into the folder, or compress with --tokenizer."
        )
    tokenizer = load_tokenizer(source.checkpoint)
    stops = getattr(source.checkpoint.model.generation_config, "eos_token_id", None)
    stops = tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (stops,)
    vocabulary = read_vocabulary(source.tokenizer, tokenizer, sizes.vocab_size, stops)
    codes = _codes(job) if job.options.quantize == CODES else {}
    return replace(job, extra=Prepared(layout, vocabulary, sizes, codes))


def _codes(job: Job) -> Mapping[str, Quantized]:
    """The codes of a model, where llama.cpp has such blocks.

    Raises:
        UsageError: there are none, or they have zero points.
    """
    codes = require_codes(job.source, job.shrunk, "blocks of llama.cpp")
    if not all(code.shape.symmetric for code in codes.values()):
        raise UsageError("The blocks Q4_0 and Q8_0 of llama.cpp have no zero points: compress without --asymmetric.")
    return codes


def foresee(architecture: Architecture, config: Any, tokenizer: Path | None) -> None:
    """Refuse a model whose export would be refused, pruned or not.

    Args:
        architecture: of the dense model.
        config: of the dense model.
        tokenizer: where its tokenizer is; None where that is not known yet.

    Raises:
        UsageError: with the reason.
    """
    _, sizes = _layout(architecture, config)
    if tokenizer is not None:
        read_vocabulary(tokenizer, load_tokenizer(tokenizer), sizes.vocab_size, ())


def _layout(architecture: Architecture, config: Any) -> tuple[Any, Any]:
    """The layout of a family and the sizes of a model of it.

    Raises:
        UsageError: llama.cpp cannot compute a model of this configuration.
    """
    sizes, layout = architecture.dimensions(config), LAYOUTS.find(architecture.model_type)
    if reason := layout.refusal(config, sizes):
        raise UsageError(f"There is no export to gguf for this model: {reason}. Use --format safetensors.")
    return layout, sizes


def write(job: Job, folder: Path, quantize: str) -> Path:
    """Write the file of a job, its large matrices as `quantize` says."""
    config, tensors, prepared = job.shrunk.config, job.shrunk.tensors, job.extra
    layout, sizes = prepared.layout, prepared.sizes
    keys = layout.keys(config, sizes) | {"general.name": Path(job.source.origin.model or "model").name}
    codes = prepared.codes if quantize == CODES else {}
    entries = with_scales(layout, config, sizes, tensors, codes)
    name = architecture_name(layout, config)
    return write_file(folder / FILE, name, keys, entries, prepared.vocabulary, quantize)
