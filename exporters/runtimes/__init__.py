"""Which runtimes take an exported model of these sizes, and where its fewer states and channels are worth something.

Facts were checked in November 2026 by running the consumers or reading their source. What is special about a family
stands in a file of its own, named as its `model_type`; for the others only what was run is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmc.runtime.models.architectures.capabilities import Otherwise
from ssmc.runtime.models.consumers import CONSUMERS, misfit
from ssmc.runtime.models.families import Architecture, Dimensions, find_family
from ssmc.runtime.registry import Registry


@dataclass(frozen=True)
class Runtime:
    """One line of the table."""

    name: str
    reads: str  # the export format it starts from
    runs: bool
    remark: str
    consumer: str = ""  # its name in `consumers`, where it has one


Table = Callable[[Dimensions, str, "float | None"], list[Runtime]]
"""Lines for the sizes of an exported model, what is to be said of a Triton kernel that decodes it, and its epsilon."""

_RAN = {
    **{"onnxruntime": "onnxruntime, CPU", "genai": "onnxruntime-genai", "openvino": "OpenVINO, CPU"},
    **{"llama.cpp": "llama.cpp, CPU", "mlx-lm": "mlx-lm", "vllm": "vLLM"},
}
"""What a family without a table of its own is listed for, where it is known there: consumer -> its line's name."""
_BY_SOURCE = {"vllm": "Mamba-1 by source: its build for a CPU has no kernel"}
"""What was not run of mixers without heads."""

TABLES: Registry[Table] = Registry(__name__, "table")
"""model_type -> its table."""


def runs_where(
    sizes: Dimensions,
    dense_d_state: int,
    model_type: str,
    epsilon: float | None = None,
    otherwise: Sequence[Otherwise] = (),
) -> list[Runtime]:
    """The table for a model of these sizes.

    Args:
        sizes: of the exported model; a Mamba-2's have heads.
        dense_d_state: N before pruning, to say what is gained.
        model_type: of its family.
        epsilon: of its norms, where that is known.
        otherwise: what software computes otherwise, see `Mixing.otherwise`.
    """
    return [_corrected(row, otherwise) for row in _rows(sizes, dense_d_state, model_type, epsilon)]


def _rows(sizes: Dimensions, dense_d_state: int, model_type: str, epsilon: float | None) -> list[Runtime]:
    table = TABLES.find(model_type)
    if table is None:
        family = find_family(model_type)
        known = [name for name in _RAN if family is not None and name not in family.capabilities.unknown_to]
        return [
            line("transformers", "transformers", sizes, "any d_state"),
            Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
            *(line(_RAN[name], name, sizes, _any_state(name, sizes), epsilon) for name in known),
        ]
    padded = 1 << (sizes.d_state - 1).bit_length()
    decode = "gains" if padded < dense_d_state else "no gain"
    decode += "" if padded == sizes.d_state else f": {sizes.d_state} states are padded to {padded}"
    return table(sizes, decode, epsilon)


def _any_state(consumer: str, sizes: Dimensions) -> str:
    said = _BY_SOURCE.get(consumer) if sizes.heads is None else None
    return "any d_state" + (f"; {said}" if said else "")


def line(name: str, consumer: str, sizes: Dimensions, remark: str, epsilon: float | None = None) -> Runtime:
    """A line of the table of `consumers`: whether a consumer runs an export of these sizes, and the reason if not."""
    reason = misfit(consumer, sizes, epsilon)
    remark += "" if reason is None else f"; {reason}"
    return Runtime(name, CONSUMERS[consumer].format, reason is None, remark, consumer)


def _corrected(row: Runtime, otherwise: Sequence[Otherwise]) -> Runtime:
    """A line that says what its software computes otherwise."""
    found = [other for other in otherwise if other.consumer == row.consumer]
    remark = "; ".join([row.remark, *(other.what for other in found)])
    wrong = any(other.wrong and not other.release for other in found)
    return replace(row, runs=row.runs and not wrong, remark=remark)


def gguf_runs_where(architecture: Architecture, config: Any) -> list[Runtime]:
    """The table for a GGUF file of a model of this configuration."""
    sizes = architecture.dimensions(config)
    any_size = "any d_state" if sizes.heads is None else "any d_state, any heads"
    gpu = "falls back to the CPU, layer by layer, for sizes its kernels have not"
    return [
        _corrected(Runtime("llama.cpp, CPU", "gguf", True, any_size, "llama.cpp"), architecture.otherwise(config)),
        Runtime("llama.cpp, GPU", "gguf", True, gpu + "; by source"),
    ]
