"""A graph with explicit states, built from the tensors of a model, that onnxruntime runs."""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes({"ssmc.exporters.onnx.graph": "Settings build"})
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
