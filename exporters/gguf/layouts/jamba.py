"""Jamba in llama.cpp: layers of Mamba-1 among layers of attention without positions."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts
from ssmc.runtime.models.architectures.units import head_dim_of


def refusal(config: Any, sizes: Any) -> str | None:
    """d_inner is twice d_model, the activation silu."""
    if sizes.d_inner != 2 * sizes.d_model:
        return f"llama.cpp takes a d_inner of 2 x d_model only, that is {2 * sizes.d_model}, here it is {sizes.d_inner}"
    if config.num_attention_heads * head_dim_of(config) != config.hidden_size:
        return (
            "llama.cpp takes attention of Jamba only as wide as d_model: its query heads have to stay (leave attention "
            "out of --pattern; expert and expert-width can go)"
        )
    if config.mamba_proj_bias:
        return "llama.cpp has no biases in in_proj and out_proj"
    return parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    attends = ["attention" in kind and "linear" not in kind for kind in config.layers_block_type]
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if here else 0 for here in attends],
        **parts.head_width(config),
    }
    if config.num_experts > 1:
        own |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    general = parts.general(sizes, config.rms_norm_eps, config.intermediate_size, config.max_position_embeddings)
    return general | parts.mamba1_keys(sizes.d_inner, sizes.d_state, sizes.dt_rank, sizes.d_conv) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for layer in range(sizes.n_layer):
        name, block = f"model.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "input_layernorm.weight"])
        yield parts.Entry(f"{block}.ffn_norm.weight", tensors[name + "pre_ff_layernorm.weight"])
        if name + "mamba.A_log" in tensors:
            yield from parts.mamba1_mixer(tensors, name + "mamba.", block)
        else:
            yield from parts.attention(tensors, name + "self_attn.", block)
        yield from _feed_forward(tensors, name + "feed_forward.", block)


def _feed_forward(tensors: parts.Tensors, name: str, block: str) -> parts.Entries:
    """A gated MLP, or some of which a router chooses."""
    if name + "router.weight" not in tensors:
        for part in ("gate", "up", "down"):
            yield from parts.linear(tensors, f"{name}{part}_proj", f"{block}.ffn_{part}")
        return
    yield parts.Entry(f"{block}.ffn_gate_inp.weight", tensors[name + "router.weight"])
    gate, up = tensors[name + "experts.gate_up_proj"].chunk(2, dim=1)
    yield parts.Entry(f"{block}.ffn_gate_exps.weight", gate, True)
    yield parts.Entry(f"{block}.ffn_up_exps.weight", up, True)
    yield parts.Entry(f"{block}.ffn_down_exps.weight", tensors[name + "experts.down_proj"], True)
