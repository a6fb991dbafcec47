"""Run a model token by token, with torch or onnxruntime alike, and let it write.

session = open_session("ssmc-out/safetensors")      # or "ssmc-out/onnx", "tiny", a hub id
logits = session.prefill([[5, 8, 13]])              # (B, V), the states kept
logits = session.step([21])                         # one more token of every sequence
for piece in generate("tiny", "Once upon a time"):  # text as it comes
    print(piece, end="", flush=True)
"""

from ssmc.runtime.models.generation.generate import Generation, generate, generate_batch, stream_tokens
from ssmc.runtime.models.generation.onnx_export import OnnxExport, load_onnx_export
from ssmc.runtime.models.generation.onnx_graph import check_runtime, is_onnx_export
from ssmc.runtime.models.generation.onnx_session import OnnxSession
from ssmc.runtime.models.generation.opening import LoadedSession, open_session, warm_up
from ssmc.runtime.models.generation.sampling import Sampling
from ssmc.runtime.models.generation.session import Session
from ssmc.runtime.models.generation.torch_session import TorchSession

__all__ = [
    "Generation",
    "LoadedSession",
    "OnnxExport",
    "OnnxSession",
    "Sampling",
    "Session",
    "TorchSession",
    "check_runtime",
    "generate",
    "generate_batch",
    "is_onnx_export",
    "load_onnx_export",
    "open_session",
    "stream_tokens",
    "warm_up",
]
