"""Which runtimes take an exported model of these sizes, and where its fewer states and channels are worth something.

Facts were checked in November 2026 by running the consumers or reading their source. What is special about a family
stands in a file of its own, named as its `model_type`; for the others only what was run is listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssmc.runtime.models.consumers import CONSUMERS, misfit
from ssmc.runtime.models.families import Architecture, Dimensions
from ssmc.runtime.registry import Registry


@dataclass(frozen=True)
class Runtime:
    """One line of the table."""

    name: str
    reads: str  # the export format it starts from
    runs: bool
    remark: str


Table = Callable[[Dimensions, str, "float | None"], list[Runtime]]
"""Lines for the sizes of an exported model, what is to be said of a Triton kernel that decodes it, and its epsilon."""

TABLES: Registry[Table] = Registry(__name__, "table")
"""model_type -> its table."""


def runs_where(sizes: Dimensions, dense_d_state: int, model_type: str, epsilon: float | None = None) -> list[Runtime]:
    """The table for a model of these sizes.

    Args:
        sizes: of the exported model; a Mamba-2's have heads.
        dense_d_state: N before pruning, to say what is gained.
        model_type: of its family.
        epsilon: of its norms, where that is known.
    """
    table = TABLES.find(model_type)
    if table is None:
        return [
            Runtime("transformers", "safetensors", True, "any d_state"),
            Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
        ]
    padded = 1 << (sizes.d_state - 1).bit_length()
    decode = "gains" if padded < dense_d_state else "no gain"
    decode += "" if padded == sizes.d_state else f": {sizes.d_state} states are padded to {padded}"
    return table(sizes, decode, epsilon)


def line(name: str, consumer: str, sizes: Dimensions, remark: str, epsilon: float | None = None) -> Runtime:
    """A line of the table of `consumers`: whether a consumer runs an export of these sizes, and the reason if not."""
    reason = misfit(consumer, sizes, epsilon)
    remark += "" if reason is None else f"; {reason}"
    return Runtime(name, CONSUMERS[consumer].format, reason is None, remark)


def gguf_runs_where(architecture: Architecture, config: Any) -> list[Runtime]:
    """The table for a GGUF file of a model of this configuration."""
    sizes = architecture.dimensions(config)
    gpu = "falls back to the CPU, layer by layer, for sizes its kernels have not"
    return [
        Runtime("llama.cpp, CPU", "gguf", True, "any d_state" if sizes.heads is None else "any d_state, any heads"),
        Runtime("llama.cpp, GPU", "gguf", True, gpu + "; by source"),
    ]
