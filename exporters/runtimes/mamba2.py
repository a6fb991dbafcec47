"""Which runtimes take a Mamba-2."""

from __future__ import annotations

from ssmc.exporters.runtimes import Runtime, line
from ssmc.runtime.models.families import Dimensions


def table(sizes: Dimensions, decode: str, epsilon: float | None = None) -> list[Runtime]:
    """Its lines, see `runs_where`."""
    n = sizes.d_state
    prefill = "any d_state, time falls with it" if n >= 16 else "any d_state, no gain below 16"
    steps = "" if n % 32 == 0 else "; fastest in steps of 32"
    return [
        line("transformers", "transformers", sizes, "any d_state"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
        line("onnxruntime, CPU", "onnxruntime", sizes, "any d_state, also different ones in each layer"),
        line("mamba_ssm, prefill (Triton)", "mamba-ssm", sizes, prefill),
        line("mamba_ssm, decode (Triton)", "mamba-ssm", sizes, decode),
        line("vLLM", "vllm", sizes, f"decode {decode}"),
        line("llama.cpp, CPU", "llama.cpp", sizes, "any d_state and number of heads" + steps),
        Runtime("llama.cpp, CUDA", "gguf", n in (128, 256), "its GPU kernel takes d_state 128 or 256 only"),
        line("mlx-lm", "mlx-lm", sizes, "d_state in multiples of 32"),
    ]
