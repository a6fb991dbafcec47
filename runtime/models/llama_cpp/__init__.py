"""llama.cpp, through the package xllamacpp, in a process of its own: what it asserts would end ours.

LlamaCpp      a GGUF file that llama.cpp has loaded, and what it says of tokens
LlamaSession  the same as a session, for benchmarks, evaluation and generation
GgufExport    an export as benchmarks and evaluations see a model
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.models.llama_cpp.client": "LlamaCpp is_installed",
        "ssmc.runtime.models.llama_cpp.session": "LlamaSession",
        "ssmc.runtime.models.llama_cpp.export": "GgufExport check_llama_cpp is_gguf_export load_gguf_export",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
