"""`--format compressed-tensors`: packed codes that transformers and vLLM read, the layout `pack-quantized`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssmc.exporters.format import Job, NoOptions, Proof
from ssmc.exporters.formats.safetensors import Safetensors

if TYPE_CHECKING:
    from ssmc.exporters.runtimes import Runtime


VLLM_OUTPUTS = 32
"""vLLM 0.32's kernel for CPUs takes maps whose outputs are a multiple of it; those for GPUs want 64."""


class CompressedTensors(Safetensors):
    """A checkpoint whose quantised linear maps hold the codes of `ssmc compress --quantize`."""

    name = "compressed-tensors"
    help = "packed codes of a model compressed with --quantize, for transformers and vLLM"
    Options = NoOptions
    packages = ("compressed_tensors",)
    extra = "compressed-tensors"

    def prepare(self, job: Job) -> Job:
        """Refuse models without codes, and pack the others."""
        from ssmc.exporters.compressed_tensors import pack

        job = super().prepare(job)
        return replace(job, extra=pack(job))

    def holds_codes(self, job: Job) -> bool:
        """Always."""
        return True

    def space(self, job: Job) -> int:
        """The tensors as they are written."""
        from ssmc.runtime.models.checkpoints import tensor_bytes

        return tensor_bytes(job.extra.tensors)

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write config.json and weights."""
        from ssmc.exporters.compressed_tensors import write

        return write(job, folder)

    def verify(self, job: Job, folder: Path) -> Proof:
        """Have transformers read the files and run it beside the masked model."""
        from ssmc.exporters.compressed_tensors import compare

        comparison = compare(job, folder)
        about = job.extra.summary()
        remark = (
            f"{about['modules']} linear maps hold codes of {about['bits']} bits in groups of {about['group_size']}. "
            "transformers read them back, with the package compressed-tensors."
        )
        return Proof(comparison, about={self.name: about}, remarks=(remark, *job.extra.remarks))

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """What reads codes."""
        from ssmc.exporters.runtimes import Runtime

        refused = _refused_by_vllm(job)
        return (
            Runtime("transformers, with compressed-tensors", self.name, True, "unpacked while it is loaded"),
            Runtime("vLLM", self.name, refused is None, refused or "groups of 32, 64 or 128; 0.32 on a CPU was tried"),
        )


def _refused_by_vllm(job: Job) -> str | None:
    """Why vLLM does not run the codes; None where it does."""
    if not job.source.checkpoint.architecture.capabilities.heads:
        return "by source, its Mamba-1 takes no codes"
    for name, code in job.extra.codes.items():
        if len(code.codes) % VLLM_OUTPUTS:
            module = name.removesuffix(".weight").rpartition(".")[2]
            return (
                f"its kernels take outputs in multiples of {VLLM_OUTPUTS}, {module} has {len(code.codes)}: "
                "--quantize-modules without it"
            )
    return None


COMPRESSED_TENSORS = CompressedTensors()
