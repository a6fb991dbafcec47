"""Which runtimes take a Mamba-1."""

from __future__ import annotations

from ssmc.exporters.runtimes import Runtime, line
from ssmc.runtime.models.consumers import misfit
from ssmc.runtime.models.families import Dimensions


def table(sizes: Dimensions, decode: str, epsilon: float | None = None) -> list[Runtime]:
    """Its lines, see `runs_where`."""
    reason = misfit("llama.cpp", sizes)
    gpu = "its GPU kernel takes d_state 16 only" + (f"; {reason}" if reason else "")
    return [
        line("transformers", "transformers", sizes, "any d_state and d_inner"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state and d_inner, time falls with them"),
        line("onnxruntime, CPU", "onnxruntime", sizes, "any d_state and d_inner, also different ones in each layer"),
        Runtime(
            "mamba_ssm, prefill (CUDA)",
            "mamba-ssm",
            sizes.d_state <= 256,
            "d_state 1 to 256, time linear in it and in d_inner",
        ),
        line("mamba_ssm, decode (Triton)", "mamba-ssm", sizes, decode),
        line("vLLM", "vllm", sizes, f"decode {decode}"),
        line("llama.cpp, CPU", "llama.cpp", sizes, "any d_state, time falls with it"),
        Runtime("llama.cpp, CUDA", "gguf", reason is None and sizes.d_state == 16, gpu),
        line("mlx-lm", "mlx-lm", sizes, "any d_state and d_inner", epsilon),
    ]
