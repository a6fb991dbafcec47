"""`--format sparse24`: a half-precision checkpoint with exact zeros, and the list of the modules that are 2:4.

The checkpoint is an ordinary one that every loader reads and runs dense. Which of its modules are 2:4, and which
backend of sparse tensor cores takes each, stands in the manifest of ssmc and nowhere in config.json: a
`sparsity_config` there stops vLLM from loading the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.exporters.format import Job, Proof, Table, option
from ssmc.exporters.formats.safetensors import Safetensors
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.exporters.runtimes import Runtime
    from ssmc.exporters.sparse24 import Sparse24Module
    from ssmc.runtime.models.families import Architecture

HALVES = ("float16", "bfloat16")
PACKED = "sparse24-packed"


@dataclass(frozen=True)
class Sparse24Options:
    """What a user may choose about a 2:4 checkpoint."""

    dtype: str | None = option(
        "which half precision", choices=HALVES, shown="the model's own if it is a half one, else bfloat16"
    )
    packed: bool = option("store 2:4 matrices in 9/16 of their space; only ssmc reads that", False)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in HALVES:
            raise UsageError(f"Sparse tensor cores do not take {self.dtype}. Choose {' or '.join(HALVES)}.")


class Sparse24(Safetensors):
    """A checkpoint in half precision whose 2:4 modules are named in its manifest."""

    name = "sparse24"
    help = "a half-precision checkpoint of a model compressed with --pattern 2:4, and the list of its 2:4 modules"
    Options = Sparse24Options
    whole_model, at_once = True, 12  # its weights are rounded and shaken

    def missing(self, architecture: Architecture) -> str | None:
        """Not of hybrids."""
        return "it knows the modules of state-space mixers alone" if not architecture.capabilities.uniform else None

    def folder(self, options: Sparse24Options) -> str:
        """Packed files have a folder of their own."""
        return PACKED if options.packed else self.name

    def layout_of(self, job: Job) -> str:
        """The checkpoint format to write."""
        return PACKED if job.options.packed else self.layout

    def prepare(self, job: Job) -> Job:
        """Round to half precision."""
        from ssmc.exporters.sparse24 import round_to_half

        job = super().prepare(job)
        shrunk, half = round_to_half(job.source, job.shrunk, job.options.dtype)
        return replace(job, shrunk=shrunk, extra=half)

    def weight_bytes(self, job: Job, folder: Path) -> int:
        """Of the tensors, packed or not."""
        from ssmc.runtime.models.checkpoints import tensor_bytes
        from ssmc.runtime.models.checkpoints.packed_format import pack_tensors

        return tensor_bytes(pack_tensors(job.shrunk.tensors) if job.options.packed else job.shrunk.tensors)

    def verify(self, job: Job, folder: Path) -> Proof:
        """Compare with the masked model, rounded, and see what rounding did to it."""
        from ssmc.exporters.sparse24 import compare_half, section

        comparison, rounding = compare_half(job, folder)
        remark = (
            f"The model compared is the masked one in half precision; rounding it moved a logit by at most "
            f"{rounding.max_difference:.2e} (allowed {rounding.tolerance:.2e})."
        )
        about = section(job.extra, rounding, job.options.packed)
        tables = (_table(job.extra.modules),)
        details = replace(job.extra, rounding=rounding)
        return Proof(comparison, about={self.name: about}, remarks=(remark,), tables=tables, details=details)

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """What takes a checkpoint, read for a 2:4 one."""
        from ssmc.exporters.sparse24 import where_it_runs

        return where_it_runs(super().runs_where(job), job.options.packed)


def _table(modules: Sequence[Sparse24Module]) -> Table:
    """Which modules are 2:4 and what takes them, one line for all layers with the same answer."""
    kinds: dict[tuple[Any, ...], int] = {}
    for module in modules:
        kind = (module.name.rpartition(".")[2], module.shape, module.backends, module.remark)
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = tuple(
        (name, str(count), " x ".join(map(str, shape)), ", ".join(backends) or f"none: {remark}")
        for (name, shape, backends, remark), count in kinds.items()
    )
    return Table("2:4 modules", ("module", "layers", "out x in", "sparse tensor cores"), rows)


SPARSE24 = Sparse24()
