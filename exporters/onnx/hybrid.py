"""Hybrids as graphs: Mamba-2 mixers, attention and MLPs in one residual stream.

A mixer keeps what a Mamba-2's does. Attention keeps keys and values of all tokens, past_key_i and past_value_i, (B, KV
heads, past, head_dim); which of them are real is past_mask, (B, past), 1 and 0 in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.family import Block, GraphFamily, Shape
from ssmc.exporters.onnx.layers import GENAI, ORT, PORTABLE, mamba2
from ssmc.exporters.onnx.ops.attention import AttentionSizes, attend, rope_of, see
from ssmc.exporters.onnx.ops.padding import Tokens
from ssmc.exporters.onnx.ops.parts import Layer, silu
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.generation.onnx_names import GROWS


class HybridGraph(GraphFamily):
    """What hybrids have in common; a family says how its blocks are put together.

    Attributes:
        attention_name: attribute of a block.
        mixer: what writes mixers.
        epsilon_field: of the configuration.
    """

    TARGETS: tuple[str, ...] = (PORTABLE, ORT, GENAI)  # ORT: LinearAttention decodes in the mixers
    embedding, final_norm = "model.embed_tokens.weight", "model.norm.weight"
    attention_name = "self_attn"
    epsilon_field = "rms_norm_eps"
    mixer: Any = mamba2  # a `GraphLayer`

    def check(self, config: Any) -> None:
        """Refuse other activations, and rotary positions that depend on the length.

        Raises:
            CheckpointError: with the reason.
        """
        for name in ("hidden_act", "mamba_hidden_act"):
            if getattr(config, name, "silu") not in ("silu", "swish"):
                raise CheckpointError(
                    f"The ONNX graph has silu as activation, this model's is {getattr(config, name)}. Export to "
                    "another format."
                )
        self.rope(config)

    def epsilon(self, config: Any) -> float:
        """Of the norms."""
        return float(getattr(config, self.epsilon_field))

    def has_mixer(self, config: Any, layer: int) -> bool:
        """Whether a layer has a state-space mixer."""
        return config.layers_block_type[layer] == "linear_attention"

    def has_attention(self, config: Any, layer: int) -> bool:
        """Whether a layer has attention."""
        return config.layers_block_type[layer] in ("full_attention", "attention")

    def rope(self, config: Any) -> tuple[torch.Tensor, float] | None:
        """Frequencies and factor of rotary positions; None without."""
        return rope_of(config, self.head_dim(config))

    def head_dim(self, config: Any) -> int:
        """Of attention."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def scale(self, config: Any) -> float:
        """Of the scores of attention."""
        return float(self.head_dim(config) ** -0.5)

    def sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
        """Of mixer and attention, read from the layer's own tensors; empty for one that keeps nothing."""
        found: dict[str, int] = {}
        if self.has_mixer(config, layer):
            found |= self.mixer_sizes(config, tensors, self.mixer_prefix(config, layer))
        if self.has_attention(config, layer):
            found |= self.attention_sizes(config, tensors, layer)
        return found

    def mixer_prefix(self, config: Any, layer: int) -> str:
        """How the names of a mixer's tensors start."""
        return architecture_for(config.model_type).mixer_prefix(layer)

    def attention_sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
        """Of a layer's attention, read from its tensors."""
        prefix, width = f"model.layers.{layer}.{self.attention_name}.", self.head_dim(config)
        heads, kv_heads = (len(tensors[f"{prefix}{name}_proj.weight"]) // width for name in "qk")
        return {"attention_heads": heads, "kv_heads": kv_heads, "attention_head_dim": width}

    def mixer_sizes(self, config: Any, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, int]:
        """Of the mixer whose tensors' names start so."""
        return mamba2.sizes_at(prefix, tensors, architecture_for(config.model_type).dimensions(config).groups)

    def states(self, sizes: Mapping[str, int]) -> Mapping[str, Shape]:
        """Of mixer and attention."""
        found: dict[str, Shape] = {}
        if "d_inner" in sizes:
            found |= self.mixer.states(sizes)
        if "kv_heads" in sizes:
            shape = (sizes["kv_heads"], GROWS, sizes["attention_head_dim"])
            found |= {"key": shape, "value": shape}
        return found

    def common_states(self, config: Any) -> Mapping[str, Shape]:
        """Which tokens of the cache are real."""
        layers = range(config.num_hidden_layers)
        return {"mask": (GROWS,)} if any(self.has_attention(config, layer) for layer in layers) else {}

    def shared(
        self,
        op: OpBuilder,
        config: Any,
        input_ids: ir.Value,
        tokens: Tokens,
        past: Mapping[str, ir.Value],
        hidden: ir.Value,
    ) -> tuple[Any, dict[str, ir.Value]]:
        """Which tokens see which."""
        if "mask" not in past:
            return None, {}
        seen, mask = see(op, input_ids, tokens, past["mask"], self.rope(config))
        return seen, {"mask": mask}

    def mix(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """What the state-space mixer makes of (L, B, d_model), normed."""
        prefix = self.mixer_prefix(block.config, block.index)
        past = {name: block.past[name] for name in ("conv", "ssm")}
        view = self.mixer_config(block.config)
        return self.mixer.mixer(op, Layer(block.weights, prefix, past, block.tokens, view, block.target), hidden)

    def mixer_config(self, config: Any) -> Any:
        """What a Mamba-2 mixer reads of a configuration, by the names it reads there."""
        architecture: Any = architecture_for(config.model_type)  # a Mamba-2
        return SimpleNamespace(
            n_groups=architecture.dimensions(config).groups,
            layer_norm_epsilon=self.epsilon(config),
            time_step_limit=architecture.time_step_limits(config),
        )

    def attend(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """What attention makes of (L, B, d_model), normed."""
        prefix = f"model.layers.{block.index}.{self.attention_name}."
        width = self.head_dim(block.config)
        heads, kv_heads = (block.weights.shape(f"{prefix}{name}_proj.weight")[0] // width for name in "qk")
        sizes = AttentionSizes(heads, kv_heads, width, self.scale(block.config))
        return attend(op, block.weights, prefix, hidden, block.past, block.shared, sizes)


class TwoStages(HybridGraph):
    """Blocks of mixer or attention, and an MLP behind it, each with a norm before and a sum behind."""

    middle: str  # the norm before the MLP

    def block(self, op: OpBuilder, block: Block, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Both stages."""
        prefix, weights, config = f"model.layers.{block.index}.", block.weights, block.config
        normed = self.norm(op, weights, prefix + "input_layernorm.weight", hidden, config)
        change, present = self.first(op, block, normed)
        hidden = op.Add(hidden, change)
        normed = self.norm(op, weights, f"{prefix}{self.middle}.weight", hidden, config)
        return op.Add(hidden, self.second(op, block, prefix, normed)), present

    def second(self, op: OpBuilder, block: Block, prefix: str, normed: ir.Value) -> ir.Value:
        """What stands behind the mixer or attention."""
        return self.mlp(op, block.weights, prefix, normed)

    def first(self, op: OpBuilder, block: Block, normed: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
        """The mixer or attention."""
        return (self.mix if self.has_mixer(block.config, block.index) else self.attend)(op, block, normed)

    def mlp(self, op: OpBuilder, weights: Weights, prefix: str, normed: ir.Value) -> ir.Value:
        """An MLP with a gate, in maps of their own."""
        name = prefix + "feed_forward."
        gate = silu(op, weights.linear(op, name + "gate_proj", normed))
        return weights.linear(op, name + "down_proj", op.Mul(gate, weights.linear(op, name + "up_proj", normed)))


def gated(op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
    """Of gate and value, one behind the other on an axis: silu(gate) value."""
    gate, value = op.Split(x, axis=axis, num_outputs=2, _outputs=2)
    return op.Mul(silu(op, gate), value)


def squared(op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
    """relu(x)^2."""
    x = op.Relu(x)
    return op.Mul(x, x)


def scaled(tensors: Mapping[str, torch.Tensor], ends: Sequence[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors with weight and bias of maps multiplied by factors, by how the names of the maps end."""
    out = dict(tensors)
    for name in tensors:
        for end, factor in ends:
            if name.endswith((f"{end}.weight", f"{end}.bias", f"experts.{end}")):
                factor = (
                    factor[(slice(None), *[None] * (tensors[name].dim() - 1))] if torch.is_tensor(factor) else factor
                )
                out[name] = out[name].float() * factor
    return out
