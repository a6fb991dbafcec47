"""Falcon-H1 in llama.cpp: Mamba-2 and attention side by side, multipliers folded into the weights they follow."""

from __future__ import annotations

from typing import Any

import torch

from ssmc.exporters.gguf import parts

NAME = "falcon-h1"


def refusal(config: Any, sizes: Any) -> str | None:
    """The gate comes before the norm or there is no norm; no limits of the time step, silu, no biases."""
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "llama.cpp's norm comes behind the gate, this model's before it"
    if config.mamba_proj_bias or config.attention_bias or config.mlp_bias or config.projectors_bias:
        return "biases of its linear maps would have to be multiplied, too; that is not written yet"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"positions of the kind {config.rope_parameters['rope_type']} are not written yet"
    return parts.refused_time_steps(config) or parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    general = parts.general(sizes, config.rms_norm_eps, config.intermediate_size, config.max_position_embeddings)
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **parts.head_width(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return general | parts.mamba2_keys(sizes) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    scales = config.embedding_multiplier, config.lm_head_multiplier
    yield from parts.outside(tensors, "model.embed_tokens.weight", "model.final_layernorm.weight", *scales)
    read, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    attention = {"q": read, "k": read * config.key_multiplier, "v": read, "o": config.attention_out_multiplier}
    states = sizes.groups * sizes.d_state
    counts = torch.tensor([sizes.d_inner, sizes.d_inner, states, states, sizes.heads])
    rows = torch.tensor(config.ssm_multipliers).repeat_interleave(counts) * config.ssm_in_multiplier
    for layer in range(sizes.n_layer):
        name, block = f"model.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "input_layernorm.weight"])
        yield parts.Entry(f"{block}.ffn_norm", tensors[name + "pre_ff_layernorm.weight"])  # its own name has no end
        mixer = name + "mamba."
        yield from parts.mamba2_mixer(tensors, mixer, block, sizes.groups, rows, config.ssm_out_multiplier)
        yield from parts.attention(tensors, name + "self_attn.", block, attention)
        for part, factor in (("gate", gate), ("up", 1.0), ("down", down)):
            yield from parts.linear(tensors, f"{name}feed_forward.{part}_proj", f"{block}.ffn_{part}", factor)
