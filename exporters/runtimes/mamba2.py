"""Which runtimes take a Mamba-2."""

from __future__ import annotations

from ssmc.exporters.runtimes import Runtime, needs_twice
from ssmc.runtime.models.families import Dimensions


def table(sizes: Dimensions, decode: str) -> list[Runtime]:
    """Its lines, see `runs_where`."""
    n, channels = sizes.d_state, sizes.d_inner + 2 * sizes.groups * sizes.d_state
    strides = channels % 8 == 0
    conv = "" if strides else f"; causal_conv1d wants a multiple of 8 channels, here are {channels}"
    width = needs_twice(sizes)
    twice = not width
    prefill = ("any d_state, time falls with it" if n >= 16 else "any d_state, no gain below 16") + conv
    return [
        Runtime("transformers", "safetensors", True, "any d_state"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
        Runtime("onnxruntime, CPU", "onnx", True, "any d_state, also different ones in each layer"),
        Runtime("mamba_ssm, prefill (Triton)", "mamba-ssm", strides, prefill),
        Runtime("mamba_ssm, decode (Triton)", "mamba-ssm", strides, decode + conv),
        Runtime("vLLM", "safetensors", strides, f"decode {decode}{conv}"),
        Runtime("llama.cpp, CPU", "safetensors", twice, "any d_state, after its own conversion" + width),
        Runtime("llama.cpp, CUDA", "safetensors", twice and n in (128, 256), "d_state 128 or 256 only" + width),
        Runtime("mlx-lm", "safetensors", n % 32 == 0, "multiples of 32; of others it silently loses states"),
    ]
