"""Bamba in an ONNX graph: Mamba-2 layers among layers of attention, an MLP behind each."""

from __future__ import annotations

from ssmc.exporters.onnx.hybrid import TwoStages


class BambaGraph(TwoStages):
    """See `TwoStages`."""

    final_norm = "model.final_layernorm.weight"
    middle = "pre_ff_layernorm"


GRAPH = BambaGraph()
