"""One layer of a family in an ONNX graph: a file each, named as the `model_type`, and those registered from outside.

Nothing here needs the packages of ONNX before a layer is asked for, so it can be said without them what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ssmc.runtime.registry import Registry

__all__ = ["GENAI", "LAYERS", "ORT", "PORTABLE", "GraphLayer"]

PORTABLE, ORT, GENAI = "portable", "ort", "genai"
"""Targets of a graph: standard operators only; those of onnxruntime too; the names onnxruntime-genai looks for."""


class GraphLayer(Protocol):
    """What writes a mixer into a graph: a module with these functions, or an object with these methods."""

    TARGETS: tuple[str, ...]  # those it knows

    def sizes(self, config: Any, tensors: Mapping[str, Any], layer: int) -> dict[str, int]:
        """The sizes of a layer, read from its own tensors."""

    def states(self, sizes: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """The states of a layer of these sizes, without the batch, by name."""

    def mixer(self, op: Any, layer: Any, hidden: Any) -> tuple[Any, dict[str, Any]]:
        """What a mixer makes of (L, B, d_model), normed, and its states behind the last real token."""


class _Layers(Registry[Any]):
    """Files here hold a mixer for a stack, as functions, or a whole family's graph, as `GRAPH`."""

    def find(self, name: str | None) -> Any:
        """What writes the layers of a family, or None."""
        found = super().find(name)
        return getattr(found, "GRAPH", found)


LAYERS = _Layers(__name__)
"""model_type -> what writes its layers: a `GraphLayer` for a stack of mixers, or a `GraphFamily`."""
