"""Granite 4 in an ONNX graph: as Bamba, with factors, which go into the weights, a fused MLP, and experts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import TwoStages, gated, scaled
from ssmc.exporters.onnx.ops.experts import mixture
from ssmc.exporters.onnx.ops.parts import silu
from ssmc.exporters.onnx.ops.weights import Weights


class GraniteGraph(TwoStages):
    """See `TwoStages`."""

    middle = "post_attention_layernorm"

    def rope(self, config: Any) -> tuple[torch.Tensor, float] | None:
        """Only where the configuration asks for positions."""
        return super().rope(config) if config.position_embedding_type == "rope" else None

    def scale(self, config: Any) -> float:
        """Its own."""
        return float(config.attention_multiplier)

    def embedding_scale(self, config: Any) -> float:
        """Its own."""
        return float(config.embedding_multiplier)

    def logits_scale(self, config: Any) -> float:
        """Its own."""
        return 1.0 / float(config.logits_scaling)

    def folded(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What is added to the residual stream has a factor."""
        writers = ("mamba.out_proj", "self_attn.o_proj", "shared_mlp.output_linear")
        return scaled(tensors, [(name, float(config.residual_multiplier)) for name in (*writers, "down_proj")])

    def second(self, op: OpBuilder, block: Block, prefix: str, normed: ir.Value) -> ir.Value:
        """The MLP, and experts where there are some."""
        y = super().second(op, block, prefix, normed)
        if not block.config.num_local_experts:
            return y
        name, weights = prefix + "block_sparse_moe.", block.weights
        x = op.Reshape(normed, [-1, block.config.hidden_size])
        scores = op.MatMul(x, weights.float32(name + "router.weight", torch.t, name + "router.weight.t"))
        best, chosen = op.TopK(scores, [block.config.num_experts_per_tok], _outputs=2)
        names = (name + "experts.gate_up_proj", name + "experts.down_proj")
        mixed = mixture(op, weights, names, x, chosen, op.Softmax(best, axis=-1), gated)
        return op.Add(y, op.Reshape(mixed, op.Shape(normed)))

    def mlp(self, op: OpBuilder, weights: Weights, prefix: str, normed: ir.Value) -> ir.Value:
        """An MLP whose gate and value come out of one map."""
        name = prefix + "shared_mlp."
        half = weights.shape(name + "input_linear.weight")[0] // 2
        gate, value = weights.linears(op, name + "input_linear", normed, {"gate": half, "value": half})
        return weights.linear(op, name + "output_linear", op.Mul(silu(op, gate), value))


GRAPH = GraniteGraph()
