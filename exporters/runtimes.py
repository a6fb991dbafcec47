"""Which runtimes take an exported model of these sizes, and where its fewer states and channels are worth something.

Facts were checked in November 2026 by running the consumers or reading their source.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.runtime.models.families import Dimensions


@dataclass(frozen=True)
class Runtime:
    """One line of the table."""

    name: str
    reads: str  # the export format it starts from
    runs: bool
    remark: str


def runs_where(sizes: Dimensions, dense_d_state: int, model_type: str = "mamba") -> list[Runtime]:
    """The table for a model of these sizes.

    Args:
        sizes: of the exported model; a Mamba-2's have heads.
        dense_d_state: N before pruning, to say what is gained.
        model_type: of its family. Beside Mamba and Mamba-2 only what was run is listed.
    """
    if model_type not in ("mamba", "mamba2"):
        return [
            Runtime("transformers", "safetensors", True, "any d_state"),
            Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
        ]
    padded = 1 << (sizes.d_state - 1).bit_length()
    decode = "gains" if padded < dense_d_state else "no gain"
    decode += "" if padded == sizes.d_state else f": {sizes.d_state} states are padded to {padded}"
    return _mamba(sizes, decode) if sizes.heads is None else _mamba2(sizes, decode)


def _mamba(sizes: Dimensions, decode: str) -> list[Runtime]:
    twice = sizes.d_inner == 2 * sizes.d_model
    needs_twice = "" if twice else f"; d_inner must be 2 x d_model, here it is {sizes.d_inner}"
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
        Runtime("llama.cpp, CPU", "safetensors", twice, "any d_state, after its own conversion" + needs_twice),
        Runtime("llama.cpp, CUDA", "safetensors", twice and sizes.d_state == 16, "takes d_state 16 only" + needs_twice),
        Runtime("mlx-lm", "safetensors", True, "any d_state and d_inner"),
    ]


def _mamba2(sizes: Dimensions, decode: str) -> list[Runtime]:
    n, channels = sizes.d_state, sizes.d_inner + 2 * sizes.groups * sizes.d_state
    strides = channels % 8 == 0
    conv = "" if strides else f"; causal_conv1d wants a multiple of 8 channels, here are {channels}"
    twice = sizes.d_inner == 2 * sizes.d_model
    needs_twice = "" if twice else f"; d_inner must be 2 x d_model, here it is {sizes.d_inner}"
    prefill = ("any d_state, time falls with it" if n >= 16 else "any d_state, no gain below 16") + conv
    return [
        Runtime("transformers", "safetensors", True, "any d_state"),
        Runtime("ssmc (CPU scan)", "safetensors", True, "any d_state, time falls with it"),
        Runtime("onnxruntime, CPU", "onnx", True, "any d_state, also different ones in each layer"),
        Runtime("mamba_ssm, prefill (Triton)", "mamba-ssm", strides, prefill),
        Runtime("mamba_ssm, decode (Triton)", "mamba-ssm", strides, decode + conv),
        Runtime("vLLM", "safetensors", strides, f"decode {decode}{conv}"),
        Runtime("llama.cpp, CPU", "safetensors", twice, "any d_state, after its own conversion" + needs_twice),
        Runtime("llama.cpp, CUDA", "safetensors", twice and n in (128, 256), "d_state 128 or 256 only" + needs_twice),
        Runtime("mlx-lm", "safetensors", n % 32 == 0, "multiples of 32; of others it silently loses states"),
    ]
