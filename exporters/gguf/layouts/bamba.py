"""Bamba in llama.cpp: Mamba-2 or attention with rotary positions, then an MLP."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts
from ssmc.runtime.models.architectures.units import head_dim_of

NAME = "granitehybrid"  # of which it is a case without multipliers


def refusal(config: Any, sizes: Any) -> str | None:
    """No limits of the time step, silu, no biases."""
    if config.mamba_proj_bias or config.attention_bias or config.mlp_bias:
        return "biases of its linear maps are not written yet"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"positions of the kind {config.rope_parameters['rope_type']} are not written yet"
    if _turned(config) % 2:
        return f"llama.cpp's rotary positions turn pairs, this model's the first {_turned(config)} numbers of a head"
    return parts.refused_width(sizes) or parts.refused_time_steps(config) or parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    attends = [kind == "full_attention" for kind in config.layers_block_type]
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if here else 0 for here in attends],
        **parts.head_width(config),
        "rope.scaling.finetuned": True,
        "rope.dimension_count": _turned(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    general = parts.general(sizes, config.rms_norm_eps, config.intermediate_size, config.max_position_embeddings)
    return general | parts.mamba2_keys(sizes) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "model.embed_tokens.weight", "model.final_layernorm.weight")
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for layer in range(sizes.n_layer):
        name, block = f"model.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "input_layernorm.weight"])
        yield parts.Entry(f"{block}.ffn_norm.weight", tensors[name + "pre_ff_layernorm.weight"])
        if name + "mamba.A_log" in tensors:
            yield from parts.mamba2_mixer(tensors, name + "mamba.", block, sizes.groups)
        else:
            for entry in parts.attention(tensors, name + "self_attn.", block):
                count = heads.get(entry.name.removeprefix(f"{block}."))
                tensor = entry.tensor if count is None else parts.interleaved(entry.tensor, count, _turned(config))
                yield entry._replace(tensor=tensor)
        for part in ("gate", "up", "down"):
            yield from parts.linear(tensors, f"{name}feed_forward.{part}_proj", f"{block}.ffn_{part}")


def _turned(config: Any) -> int:
    """How many numbers of a head rotary positions turn."""
    return int(head_dim_of(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
