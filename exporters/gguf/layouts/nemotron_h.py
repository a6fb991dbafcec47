"""Nemotron-H in llama.cpp: every layer is a Mamba-2, attention without positions, or an MLP."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts

NAME = "nemotron_h"


def refusal(config: Any, sizes: Any) -> str | None:
    """No experts, no limits of the time step, no biases."""
    if "moe" in config.layers_block_type:
        return "its layers of experts are not written yet"
    if config.use_bias or config.mamba_proj_bias or config.attention_bias or config.mlp_bias:
        return "biases of its linear maps are not written yet"
    activation = parts.refused_activation(config, "mlp_hidden_act", ("relu2",))
    return activation or parts.refused_activation(config, "mamba_hidden_act") or parts.refused_time_steps(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    kinds = config.layers_block_type
    widths = [config.intermediate_size if kind == "mlp" else 0 for kind in kinds]
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    return parts.general(sizes, config.layer_norm_epsilon, widths) | parts.mamba2_keys(sizes) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "model.embeddings.weight", "model.norm_f.weight")
    for layer, kind in enumerate(config.layers_block_type):
        name, block = f"model.layers.{layer}.mixer.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[f"model.layers.{layer}.norm.weight"])
        if kind == "full_attention":
            yield from parts.attention(tensors, name, block)
        elif kind == "mlp":
            yield from parts.linear(tensors, name + "up_proj", f"{block}.ffn_up")
            yield from parts.linear(tensors, name + "down_proj", f"{block}.ffn_down")
        else:
            yield from parts.mamba2_mixer(tensors, name, block, sizes.groups)
