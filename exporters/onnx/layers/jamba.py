"""Jamba in an ONNX graph: Mamba-1 layers with norms among layers of attention, an MLP or experts behind each."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import TwoStages, gated
from ssmc.exporters.onnx.layers import GENAI, PORTABLE, mamba
from ssmc.exporters.onnx.ops.experts import mixture


class JambaGraph(TwoStages):
    """See `TwoStages`."""

    final_norm = "model.final_layernorm.weight"
    middle = "pre_ff_layernorm"
    mixer = mamba
    TARGETS = (PORTABLE, GENAI)  # its mixers are Mamba-1

    def has_mixer(self, config: Any, layer: int) -> bool:
        """Whether a layer has a state-space mixer."""
        return not self.has_attention(config, layer)

    def rope(self, config: Any) -> None:
        """Attention has no positions."""
        return

    def mixer_sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, int]:
        """Of a Mamba-1."""
        return mamba.sizes_at(prefix, tensors)

    def mixer_config(self, config: Any) -> Any:
        """The epsilon of the norms of dt, B and C."""
        return SimpleNamespace(selection_epsilon=self.epsilon(config))

    def second(self, op: OpBuilder, block: Block, prefix: str, normed: ir.Value) -> ir.Value:
        """An MLP, or experts with their shares of all."""
        name, weights = prefix + "feed_forward.", block.weights
        if name + "router.weight" not in weights:
            return super().second(op, block, prefix, normed)
        x = op.Reshape(normed, [-1, block.config.hidden_size])
        scores = op.MatMul(x, weights.float32(name + "router.weight", torch.t, name + "router.weight.t"))
        shares, chosen = op.TopK(op.Softmax(scores, axis=-1), [block.config.num_experts_per_tok], _outputs=2)
        names = (name + "experts.gate_up_proj", name + "experts.down_proj")
        return op.Reshape(mixture(op, weights, names, x, chosen, shares, gated), op.Shape(normed))


GRAPH = JambaGraph()
