"""Falcon-Mamba in an ONNX graph: a Mamba-1 whose time step, B and C pass norms without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block, Stack
from ssmc.exporters.onnx.layers import mamba


class FalconMambaGraph(Stack):
    """A stack of Mamba-1 mixers, given the norms that Jamba's have."""

    def folded(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """With weights of the norms, all 1: ONNX's operator wants some."""
        ones = {}
        for layer in range(config.num_hidden_layers):
            sizes, prefix = self.sizes(config, tensors, layer), f"backbone.layers.{layer}.mixer."
            for name, size in (("dt", "dt_rank"), ("b", "d_state"), ("c", "d_state")):
                ones[f"{prefix}{name}_layernorm.weight"] = torch.ones(sizes[size])
        return {**tensors, **ones}

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Norm and mixer; the norms in the mixer have an epsilon of their own."""
        config = block.config
        view = SimpleNamespace(
            layer_norm_epsilon=config.layer_norm_epsilon, selection_epsilon=float(config.mixer_rms_eps)
        )
        return super().block(op, replace(block, config=view), hidden)


GRAPH = FalconMambaGraph(mamba)
