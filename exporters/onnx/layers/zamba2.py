"""Zamba2 in an ONNX graph: a Mamba-2 mixer in every layer, and transformer blocks that several layers share.

A shared block reads the residual stream beside the embeddings, with adapters of the layer's own; what it puts out is
added to what the mixer reads, not to the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block
from ssmc.exporters.onnx.hybrid import HybridGraph
from ssmc.exporters.onnx.ops.attention import AttentionSizes, Seen, attend
from ssmc.exporters.onnx.ops.padding import Tokens
from ssmc.exporters.onnx.ops.parts import silu
from ssmc.runtime.errors import CheckpointError

_ACTIVATIONS = ("gelu", "silu")
_GATED_EPSILON = 1e-5


@dataclass(frozen=True)
class Shared:
    """What all blocks read: who sees whom, and the embeddings (L, B, d_model)."""

    seen: Seen
    embedded: ir.Value


class Zamba2Graph(HybridGraph):
    """See `HybridGraph`."""

    final_norm = "model.final_layernorm.weight"

    def check(self, config: Any) -> None:
        """Refuse other activations, and rotary positions that depend on the length."""
        if config.hidden_act not in _ACTIVATIONS:
            raise CheckpointError(
                f"The ONNX graph has {' or '.join(_ACTIVATIONS)} as activation of MLPs, this model's is "
                f"{config.hidden_act}. Export to another format."
            )
        self.rope(config)

    def has_mixer(self, config: Any, layer: int) -> bool:
        """Every layer."""
        return True

    def has_attention(self, config: Any, layer: int) -> bool:
        """Before some mixers."""
        return layer in config.hybrid_layer_ids

    def rope(self, config: Any) -> tuple[torch.Tensor, float] | None:
        """Only where the configuration asks for positions."""
        return super().rope(config) if config.use_mem_rope else None

    def head_dim(self, config: Any) -> int:
        """Of attention, whose input is twice as wide as the stream."""
        return int(config.attention_head_dim)

    def scale(self, config: Any) -> float:
        """Of the scores."""
        return float((self.head_dim(config) / 2) ** -0.5)

    def mixer_prefix(self, config: Any, layer: int) -> str:
        """Where a layer has its mixer."""
        inner = "mamba_decoder." if self.has_attention(config, layer) else ""
        return f"model.layers.{layer}.{inner}mamba."

    def mixer_config(self, config: Any) -> Any:
        """The epsilon of its gated norms is fixed in transformers' model."""
        view = super().mixer_config(config)
        view.layer_norm_epsilon = _GATED_EPSILON
        return view

    def attention_sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
        """As the configuration has them: no head of a shared block goes."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return {"attention_heads": heads, "kv_heads": kv_heads, "attention_head_dim": self.head_dim(config)}

    def shared(
        self,
        op: OpBuilder,
        config: Any,
        input_ids: ir.Value,
        tokens: Tokens,
        past: Mapping[str, ir.Value],
        hidden: ir.Value,
    ) -> tuple[Any, dict[str, ir.Value]]:
        """Which tokens see which, and the embeddings."""
        seen, after = super().shared(op, config, input_ids, tokens, past, hidden)
        return Shared(seen, hidden), after

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """A shared block where there is one, and the mixer."""
        config, prefix, read = block.config, f"model.layers.{block.index}.", hidden
        cache: dict[str, ir.Value] = {}
        if self.has_attention(config, block.index):
            added, cache = self._transformer(op, block, hidden)
            read = op.Add(hidden, added)
            prefix += "mamba_decoder."
        normed = self.norm(op, block.weights, prefix + "input_layernorm.weight", read, config)
        change, states = self.mix(op, block, normed)
        return op.Add(hidden, change), {**states, **cache}

    def _transformer(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """What the shared block puts out for this layer, through the layer's own map."""
        config, weights = block.config, block.weights
        number = config.hybrid_layer_ids.index(block.index)  # of the adapters
        home = config.hybrid_layer_ids[number % config.num_mem_blocks]  # the layer under whose name the block is stored
        prefix = f"model.layers.{home}.shared_transformer."

        def adapted(name: str, adapter: str, x: ir.Value) -> ir.Value:
            y = weights.linear(op, prefix + name, x)
            if f"{prefix}{adapter}.{number}.0.weight" not in weights:
                return y
            low = weights.linear(op, f"{prefix}{adapter}.{number}.0", x)
            return op.Add(y, weights.linear(op, f"{prefix}{adapter}.{number}.1", low))

        def project(name: str, x: ir.Value) -> ir.Value:
            return adapted(f"self_attn.{name}", f"self_attn.linear_{name[0]}_adapter_list", x)

        both = op.Concat(hidden, block.shared.embedded, axis=-1)
        normed = self.norm(op, weights, prefix + "input_layernorm.weight", both, config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = AttentionSizes(heads, kv_heads, self.head_dim(config), self.scale(config))
        y, cache = attend(op, weights, prefix + "self_attn.", normed, block.past, block.shared.seen, sizes, project)
        normed = self.norm(op, weights, prefix + "pre_ff_layernorm.weight", y, config)
        inner = adapted("feed_forward.gate_up_proj", "feed_forward.gate_up_proj_adapter_list", normed)
        gate, value = op.Split(inner, axis=-1, num_outputs=2, _outputs=2)
        gate = op.Gelu(gate) if config.hidden_act == "gelu" else silu(op, gate)
        y = weights.linear(op, prefix + "feed_forward.down_proj", op.Mul(gate, value))
        return weights.linear(op, f"model.layers.{block.index}.linear", y), cache


GRAPH = Zamba2Graph()
