"""`--format onnx`: a graph with explicit states for onnxruntime, proven in float32, whatever is published."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.exporters.format import Format, Job, Proof, check_choices, option
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.exporters.onnx.proof import GraphDetails
    from ssmc.exporters.runtimes import Runtime
    from ssmc.runtime.models.families import Architecture

FLOAT32, INT8, CODES = "float32", "int8", "codes"


@dataclass(frozen=True)
class OnnxOptions:
    """What a user may choose about a graph."""

    dtype: str = option(
        "of embedding and matrix products; float16 is meant for GPUs", FLOAT32, choices=(FLOAT32, "float16")
    )
    quantize: str | None = option(
        "`int8`: int8 weights for the large matrices, for CPUs; `codes`: those of `ssmc compress "
        "--quantize`, by onnxruntime's MatMulNBits",
        choices=(INT8, CODES),
    )
    activations: str = option(
        "what products with codes compute in; int8 is faster and rounds what they read",
        FLOAT32,
        choices=(FLOAT32, INT8),
    )
    state_dtype: str = option(
        "of the SSM states between tokens, `int8` with a scale for each state of a head; they are computed in float32",
        FLOAT32,
        choices=(FLOAT32, "float16", INT8),
    )
    logits: str = option("which tokens' logits the graph gives", "last", choices=("last", "all"))
    target: str = option(
        "`portable`: standard operators only; `ort`: onnxruntime's own too (Mamba-2 decodes faster); `genai`: a folder "
        "that onnxruntime-genai runs as it is",
        "portable",
        choices=("portable", "ort", "genai"),
    )
    text: str | None = option(
        "held-out text for the perplexity before and after float16 or int8, as for `ssmc compress --calib`",
        shown="stories that come along",
    )

    def __post_init__(self) -> None:
        check_choices(self, "ONNX")
        if self.quantize and self.dtype != FLOAT32:
            raise UsageError(f"{self.quantize} goes with float32: what is not quantised stays so. Leave out --dtype.")

        if self.activations != FLOAT32 and self.quantize != CODES:
            raise UsageError("--activations goes with --quantize codes.")
        if self.state_dtype != FLOAT32 and self.target == "genai":
            raise UsageError("onnxruntime-genai keeps states in float32. Leave out --state-dtype, or --target genai.")

    @property
    def lossy(self) -> bool:
        """Whether the graph computes something else than the model does in float32."""
        return self.quantize == INT8 or (self.dtype, self.state_dtype, self.activations) != (FLOAT32,) * 3


class Onnx(Format):
    """model.onnx, its weights in one file beside it, configuration and tokenizer."""

    name = "onnx"
    help = "a graph with explicit states for onnxruntime"
    Options = OnnxOptions
    packages = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    extra = "onnx"
    takes_dense = True
    uneven = True
    at_once = 8  # onnxruntime loads the graph that is proven

    def missing(self, architecture: Architecture) -> str | None:
        """Of the families that have a graph."""
        from ssmc.exporters.onnx.layers import LAYERS

        if architecture.model_type not in LAYERS.names():
            return f"there is no graph for models of type {architecture.model_type}"
        return None

    def prepare(self, job: Job) -> Job:
        """Refuse a target the family has not, and codes where there are none."""
        from ssmc.exporters.onnx.graph import require_family
        from ssmc.exporters.quantized import require_codes

        require_family(job.shrunk.config, job.options.target)
        codes = require_codes(job.source, job.shrunk, "MatMulNBits") if job.options.quantize == CODES else {}
        return replace(job, extra=codes)

    def holds_codes(self, job: Job) -> bool:
        """Where the user says so."""
        return job.options.quantize == CODES

    def space(self, job: Job) -> int:
        """The weights; a lossy graph comes after a float32 one."""
        from ssmc.runtime.models.checkpoints import parameter_count

        return parameter_count(job.shrunk.tensors) * (9 if job.options.lossy else 4)

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write the graph, and the float32 one that is proven if it is lossy."""
        from ssmc.exporters.onnx.write import write_all

        return write_all(job, folder, about(job))

    def weight_bytes(self, job: Job, folder: Path) -> int:
        """Of the file of weights."""
        from ssmc.exporters.onnx.files import DATA

        return (folder / DATA).stat().st_size

    def verify(self, job: Job, folder: Path) -> Proof:
        """Run the float32 graph beside the model in every way, and measure what float16 or int8 change."""
        from dataclasses import asdict

        from ssmc.exporters.onnx.proof import prove_written

        comparison, details = prove_written(job, folder)
        known = about(job)
        return Proof(
            comparison,
            details.ways,
            {"settings": known["settings"], "onnx": known["onnx"]}
            | {
                "rounding": [asdict(way) for way in details.rounding],
                "perplexity": None if details.quality is None else asdict(details.quality),
            },
            _remarks(details, job),
            details=details,
        )

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """Which providers of onnxruntime take the graph."""
        from ssmc.exporters.runtimes import Runtime

        half = job.options.dtype == "float16"
        cpu = "any sizes; computed in float32, float16 saves no time here" if half else "any sizes"
        codes = job.options.quantize == CODES
        operators = "needs onnxruntime's own MatMulNBits" if codes else "standard operators only"
        others = [Runtime("OpenVINO, CPU", self.name, job.options.target != "ort" and not codes, operators)]
        if job.options.target == "genai":
            others.append(Runtime("onnxruntime-genai", self.name, True, "any sizes, one sequence or padded batches"))
        if job.options.target == "ort":
            operators = "needs its own LinearAttention, tested with 1.32"
            cpu += "; " + operators
        return (
            Runtime("onnxruntime, CPU", self.name, True, cpu),
            Runtime("onnxruntime, CUDA", self.name, True, operators + "; not measured"),
            *others,
        )

    def next(self, directory: str, artefact: str) -> str:
        """The graph generates text."""
        return f'ssmc generate {shlex.quote(directory)} "Once upon a time"'


def about(job: Job) -> Mapping[str, Any]:
    """What is known of a graph before it is written: its settings and sizes, for the manifest and the graph itself."""
    from ssmc.exporters.onnx.graph import require_family
    from ssmc.runtime.models.tokenizers import TOKENIZER_JSON

    config, tensors, options = job.shrunk.config, job.shrunk.tensors, job.options
    sizes = require_family(config, options.target).sizes
    return {
        "settings": {
            name: getattr(options, name)
            for name in ("dtype", "quantize", "activations", "logits", "target", "state_dtype")
        },
        "onnx": {
            "architecture": config.model_type,
            "layers": [sizes(config, tensors, layer) for layer in range(config.num_hidden_layers)],
            "tokenizer": None if job.source.tokenizer is None else TOKENIZER_JSON,
        },
    }


def _remarks(details: GraphDetails, job: Job) -> tuple[str, ...]:
    """What float16 or int8 changed, and what states in fewer bits leave of a sequence."""
    quality = details.quality
    if quality is None:
        return ()
    noise = "" if quality.excess_stderr is None else f" (± {quality.excess_stderr:.4f})"
    worst = max(way.max_difference for way in details.rounding)
    return (
        f"The graph compared is the float32 one. What was written moves a logit by at most {worst:.2e}; perplexity on "
        f"{quality.tokens} tokens of {quality.text} is {quality.ppl_after:.4g} after {quality.ppl_before:.4g}, "
        f"{quality.excess_nats:+.4f} nats a token{noise}.",
        *_state_remark(job),
    )


def _state_remark(job: Job) -> tuple[str, ...]:
    """Bytes of the SSM states of a sequence, where they are kept in fewer bits."""
    from ssmc.runtime.models.memory import format_bytes, sequence_memory

    kept = job.options.state_dtype
    if kept == FLOAT32:
        return ()
    sizes = job.source.checkpoint.architecture.dimensions(job.shrunk.config)
    before, after = (sequence_memory(sizes, 0, 1, FLOAT32, dtype).states for dtype in (FLOAT32, kept))
    return (
        f"SSM states of a sequence take {format_bytes(after)} in {kept}, {format_bytes(before)} in float32; they were "
        "rounded after every token for this perplexity.",
    )


ONNX = Onnx()
