"""Nemotron-H in an ONNX graph: blocks of one thing each: a mixer, attention without positions, an MLP or experts."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import HybridGraph, squared
from ssmc.exporters.onnx.ops.experts import mixture
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError


class NemotronHGraph(HybridGraph):
    """See `HybridGraph`."""

    embedding, final_norm = "model.embeddings.weight", "model.norm_f.weight"
    attention_name = "mixer"
    epsilon_field = "layer_norm_epsilon"

    def check(self, config: Any) -> None:
        """Refuse MLPs of another activation, too."""
        super().check(config)
        if config.mlp_hidden_act != "relu2":
            raise CheckpointError(
                f"The ONNX graph has relu2 as activation of MLPs, this model's is {config.mlp_hidden_act}. Export to "
                "another format."
            )
        if "moe" in config.layers_block_type and config.topk_group != config.n_group:
            raise CheckpointError(
                "There is no ONNX graph for experts that are chosen among some of their groups only. Export to another "
                "format."
            )

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
        elif block.config.layers_block_type[block.index] == "moe":
            change = self.experts(op, block, prefix + "mixer.", normed)
        else:
            change = self.mlp(op, weights, prefix + "mixer.", normed)
        return op.Add(hidden, change), present

    def mlp(self, op: OpBuilder, weights: Weights, prefix: str, normed: ir.Value) -> ir.Value:
        """down_proj of relu(up_proj)^2."""
        return weights.linear(op, prefix + "down_proj", squared(op, weights.linear(op, prefix + "up_proj", normed), -1))

    def experts(self, op: OpBuilder, block: Block, prefix: str, normed: ir.Value) -> ir.Value:
        """Experts chosen by sigmoids, weighed by them, and one that every token goes through."""
        config, weights = block.config, block.weights
        x = op.Reshape(normed, [-1, config.hidden_size])
        scores = op.MatMul(x, weights.float32(prefix + "gate.weight", torch.t, prefix + "gate.weight.t"))
        scores = op.Sigmoid(scores)
        corrected = op.Add(scores, weights.float32(prefix + "gate.e_score_correction_bias"))
        _, chosen = op.TopK(corrected, [config.num_experts_per_tok], _outputs=2)
        shares = op.GatherElements(scores, chosen, axis=1)
        if config.norm_topk_prob:
            shares = op.Div(shares, op.Add(op.ReduceSum(shares, [1], keepdims=1), 1e-20))
        shares = op.Mul(shares, float(config.routed_scaling_factor))
        latent = config.moe_latent_size is not None
        read = weights.linear(op, prefix + "fc1_latent_proj", x) if latent else x
        names = (prefix + "experts.up_proj", prefix + "experts.down_proj")
        mixed = mixture(op, weights, names, read, chosen, shares, squared)
        mixed = weights.linear(op, prefix + "fc2_latent_proj", mixed) if latent else mixed
        common = self.mlp(op, weights, prefix + "shared_experts.", normed)
        return op.Add(op.Reshape(mixed, op.Shape(normed)), common)


GRAPH = NemotronHGraph()
