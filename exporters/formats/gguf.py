"""`--format gguf`: one file for llama.cpp and what is built on it, proven by llama.cpp itself where that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.exporters.format import Format, Job, Proof, check_choices, option

if TYPE_CHECKING:
    from ssmc.exporters.gguf.proof import FileDetails
    from ssmc.exporters.runtimes import Runtime
    from ssmc.runtime.models.families import Architecture

F32, CODES = "f32", "codes"
TYPES = (F32, "f16", "bf16", "q8_0", "q5_1", "q4_0", CODES)


@dataclass(frozen=True)
class GgufOptions:
    """What a user may choose about a file."""

    quantize: str = option(
        "how large matrices are stored; the rest stays float32. `codes`: those of `ssmc compress --quantize`, as "
        "blocks of Q4_0 and Q8_0",
        F32,
        choices=TYPES,
    )
    text: str | None = option(
        "held-out text for the perplexity before and after quantisation, as for `ssmc compress --calib`",
        shown="stories that come along",
    )

    def __post_init__(self) -> None:
        check_choices(self, "GGUF")

    @property
    def lossy(self) -> bool:
        """Whether the file holds other numbers than the model."""
        return self.quantize != F32


class Gguf(Format):
    """model.gguf with the tokenizer in it."""

    name = "gguf"
    help = "one file for llama.cpp, LM Studio, Ollama and others"
    Options = GgufOptions
    packages = ("gguf",)
    extra = "gguf"
    takes_dense = True

    def missing(self, architecture: Architecture) -> str | None:
        """Of the families that llama.cpp has and whose layout is written."""
        from ssmc.exporters.gguf.layouts import LAYOUTS

        if "llama.cpp" in architecture.capabilities.unknown_to:
            return f"llama.cpp has no models of type {architecture.model_type}"
        if architecture.model_type not in LAYOUTS.names():
            return f"no GGUF layout is written for models of type {architecture.model_type}"
        return None

    def foresee(self, architecture: Architecture, config: Any, tokenizer: Path | None) -> None:
        """What llama.cpp cannot compute, and tokenizers it does not know."""
        from ssmc.exporters.gguf.prepare import foresee

        foresee(architecture, config, tokenizer)

    def prepare(self, job: Job) -> Job:
        """Refuse what llama.cpp cannot compute, and read the tokenizer."""
        from ssmc.exporters.gguf.prepare import prepare

        return prepare(job)

    def holds_codes(self, job: Job) -> bool:
        """Where the user says so."""
        return job.options.quantize == CODES

    def space(self, job: Job) -> int:
        """The weights; a quantised file comes after a float32 one."""
        from ssmc.runtime.models.checkpoints import parameter_count

        return parameter_count(job.shrunk.tensors) * (8 if job.options.lossy else 4)

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write the file, and config.json for those who want to know what the model is."""
        from ssmc.exporters.gguf.prepare import write
        from ssmc.runtime.models.checkpoints.transformers_format import write_config

        shrunk, stored = job.shrunk, job.source.checkpoint.stored_config
        config = write_config(folder / "config.json", shrunk.tensors, shrunk.config, stored)
        return [write(job, folder, job.options.quantize), config]

    def weight_bytes(self, job: Job, folder: Path) -> int:
        """Of the file."""
        from ssmc.exporters.gguf.write import FILE

        return (folder / FILE).stat().st_size

    def verify(self, job: Job, folder: Path) -> Proof:
        """Have llama.cpp run the float32 file, or compare its tensors where llama.cpp is missing."""
        from ssmc.exporters.gguf.proof import prove_written

        comparison, details = prove_written(job, folder)
        about = {
            "quantize": job.options.quantize,
            "pre_tokenizer": job.extra.vocabulary.pre,
            "run_by": details.run_by,
            "rounding": None if details.rounding is None else details.rounding,
            "perplexity": None if details.quality is None else asdict(details.quality),
        }
        return Proof(comparison, details.ways, {self.name: about}, _remarks(details), details=details)

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """What reads the file."""
        from ssmc.exporters.runtimes import gguf_runs_where

        return gguf_runs_where(job.source.checkpoint.architecture, job.shrunk.config)


def _remarks(details: FileDetails) -> tuple[str, ...]:
    """Who ran it, and what quantisation changed."""
    if details.run_by is None:
        return (
            "llama.cpp is not installed here (pip install xllamacpp), so the file was read back and its tensors were "
            "compared; nothing was run.",
        )
    said = [f"Run by {details.run_by}, whole prompts and token by token, and compared by log probabilities."]
    if details.adapted is not None:
        said.append(
            f"{details.adapted}; the model was compared without that, which moved a logit by at most "
            f"{details.moved:.2e}."
        )
    if details.quality is not None:
        quality = details.quality
        noise = "" if quality.excess_stderr is None else f" (± {quality.excess_stderr:.4f})"
        said.append(
            f"The file compared is the float32 one. What was written moves a log probability by at most "
            f"{details.rounding:.2e}; perplexity on {quality.tokens} tokens of {quality.text} is "
            f"{quality.ppl_after:.4g} after {quality.ppl_before:.4g}, {quality.excess_nats:+.4f} nats a token{noise}."
        )
    return tuple(said)


GGUF = Gguf()
