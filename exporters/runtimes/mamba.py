"""Which runtimes take a Mamba-1."""

from __future__ import annotations

from ssmc.exporters.runtimes import Runtime, needs_twice
from ssmc.runtime.models.families import Dimensions


def table(sizes: Dimensions, decode: str) -> list[Runtime]:
    """Its lines, see `runs_where`."""
    width = needs_twice(sizes)
    twice = not width
    return [
        Runtime("transformers", "safetensors", True, "any d_state and d_inner"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state and d_inner, time falls with them"),
        Runtime("onnxruntime, CPU", "onnx", True, "any d_state and d_inner, also different ones in each layer"),
        Runtime(
            "mamba_ssm, prefill (CUDA)",
            "mamba-ssm",
            sizes.d_state <= 256,
            "d_state 1 to 256, time linear in it and in d_inner",
        ),
        Runtime("mamba_ssm, decode (Triton)", "mamba-ssm", True, decode),
        Runtime("vLLM", "safetensors", True, f"decode {decode}"),
        Runtime("llama.cpp, CPU", "safetensors", twice, "any d_state, after its own conversion" + width),
        Runtime("llama.cpp, CUDA", "safetensors", twice and sizes.d_state == 16, "takes d_state 16 only" + width),
        Runtime("mlx-lm", "safetensors", True, "any d_state and d_inner"),
    ]
