"""Which runtimes take an exported model of these sizes, and where its fewer states and channels are worth something.

Facts were checked in November 2026 by running the consumers or reading their source.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.architectures import Dimensions


@dataclass(frozen=True)
class Runtime:
    """One line of the table."""

    name: str
    reads: str  # the export format it starts from
    runs: bool
    remark: str


def runs_where(sizes: Dimensions, dense_d_state: int) -> list[Runtime]:
    """The table for a Mamba-1 model.

    Args:
        sizes: of the exported model.
        dense_d_state: N before pruning, to say what is gained.
    """
    n = sizes.d_state
    padded = 1 << (n - 1).bit_length()
    decode = "gains" if padded < dense_d_state else "no gain"
    decode += "" if padded == n else f": {n} states are padded to {padded}"
    twice = sizes.d_inner == 2 * sizes.d_model
    needs_twice = "" if twice else f"; d_inner must be 2 x d_model, here it is {sizes.d_inner}"
    return [
        Runtime("transformers", "safetensors", True, "any d_state and d_inner"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state and d_inner, time falls with them"),
        Runtime(
            "mamba_ssm, prefill (CUDA)", "mamba-ssm", n <= 256, "d_state 1 to 256, time linear in it and in d_inner"
        ),
        Runtime("mamba_ssm, decode (Triton)", "mamba-ssm", True, decode),
        Runtime("vLLM", "safetensors", True, f"decode {decode}"),
        Runtime("llama.cpp, CPU", "safetensors", twice, "any d_state, after its own conversion" + needs_twice),
        Runtime("llama.cpp, CUDA", "safetensors", twice and n == 16, "takes d_state 16 only" + needs_twice),
        Runtime("mlx-lm", "safetensors", True, "any d_state and d_inner"),
    ]
