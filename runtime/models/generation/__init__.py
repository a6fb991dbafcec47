"""Run a model token by token, with torch or onnxruntime alike, and let it write.

session = open_session("ssmc-out/safetensors")      # or "ssmc-out/onnx", "tiny", a hub id
logits = session.prefill([[5, 8, 13]])              # (B, V), the states kept
logits = session.step([21])                         # one more token of every sequence
for piece in generate("tiny", "Once upon a time"):  # text as it comes
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.models.generation.writing": "Generation generate generate_batch stream_tokens",
        "ssmc.runtime.models.generation.onnx_export": "OnnxExport load_onnx_export",
        "ssmc.runtime.models.generation.onnx_graph": "check_runtime is_onnx_export",
        "ssmc.runtime.models.generation.onnx_session": "OnnxSession",
        "ssmc.runtime.models.generation.opening": "LoadedSession open_session warm_up",
        "ssmc.runtime.models.generation.sampling": "Sampling",
        "ssmc.runtime.models.generation.session": "Session",
        "ssmc.runtime.models.generation.torch_session": "TorchSession",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
