"""Which families have an ONNX graph, and the module that writes one of their layers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ssmc.runtime.models.families.mamba import MambaArchitecture
from ssmc.runtime.models.families.mamba2 import Mamba2Architecture

PORTABLE, ORT = "portable", "ort"
"""Targets of a graph: standard operators only; those of onnxruntime too."""


@dataclass(frozen=True)
class LayerWriter:
    """Where a layer of a family is written.

    Attributes:
        module: its full name; it has `sizes`, `states` and `mixer`, as `layers/mamba.py` has them.
        targets: those it knows.
    """

    module: str
    targets: tuple[str, ...] = (PORTABLE,)

    def load(self) -> Any:
        """The module; it needs the packages of the extra `onnx`."""
        return import_module(self.module)


_WRITERS: dict[str, LayerWriter] = {}


def register_layers(model_type: str, writer: LayerWriter) -> None:
    """Give a family a graph."""
    _WRITERS[model_type] = writer


def layer_writer(model_type: str) -> LayerWriter | None:
    """Of a family; None where it has no graph."""
    return _WRITERS.get(model_type)


def families() -> tuple[str, ...]:
    """Those that have a graph."""
    return tuple(_WRITERS)


register_layers(MambaArchitecture.model_type, LayerWriter("ssmc.exporters.onnx.layers.mamba"))
register_layers(Mamba2Architecture.model_type, LayerWriter("ssmc.exporters.onnx.layers.mamba2", (PORTABLE, ORT)))
