"""Nemotron-H in an ONNX graph: blocks of one thing each, a Mamba-2 mixer, attention without positions, or an MLP."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import HybridGraph
from ssmc.runtime.errors import CheckpointError


class NemotronHGraph(HybridGraph):
    """See `HybridGraph`."""

    embedding, final_norm = "model.embeddings.weight", "model.norm_f.weight"
    mixer_name = attention_name = "mixer"
    epsilon_field = "layer_norm_epsilon"

    def check(self, config: Any) -> None:
        """Refuse MLPs of another activation, too."""
        super().check(config)
        if config.mlp_hidden_act != "relu2":
            raise CheckpointError(
                f"The ONNX graph has relu2 as activation of MLPs, this model's is {config.mlp_hidden_act}. Export to "
                "another format."
            )

    def has_experts(self, config: Any) -> bool:
        """Among the kinds of layers."""
        return "moe" in config.layers_block_type

    def rope(self, config: Any) -> None:
        """Attention has no positions."""
        return

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Norm, one thing, sum."""
        prefix, weights = f"model.layers.{block.index}.", block.weights
        present: dict[str, ir.Value] = {}
        normed = self.norm(op, weights, prefix + "norm.weight", hidden, block.config)
        if self.has_mixer(block.config, block.index):
            change, present = self.mix(op, block, normed)
        elif self.has_attention(block.config, block.index):
            change, present = self.attend(op, block, normed)
        else:
            up = op.Relu(weights.linear(op, prefix + "mixer.up_proj", normed))
            change = weights.linear(op, prefix + "mixer.down_proj", op.Mul(up, up))
        return op.Add(hidden, change), present


GRAPH = NemotronHGraph()
