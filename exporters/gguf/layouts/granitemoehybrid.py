"""Granite 4 in llama.cpp: Mamba-2 or attention, then an MLP that all tokens share and, in some models, experts."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts
from ssmc.runtime.models.architectures.units import head_dim_of

NAME = "granitehybrid"


def refusal(config: Any, sizes: Any) -> str | None:
    """No limits of the time step, silu, no biases."""
    if config.mamba_proj_bias or config.attention_bias:
        return "llama.cpp has no biases in in_proj, out_proj and attention"
    if not config.mamba_n_heads or config.rope_parameters.get("rope_type", "default") != "default":
        return f"positions of the kind {config.rope_parameters.get('rope_type')} are not written yet"
    width = parts.refused_width(sizes, config.num_local_experts > 0)
    return width or parts.refused_time_steps(config) or parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    experts, turns = config.num_local_experts, _turns(config)
    attends = [kind == "full_attention" for kind in config.layer_types]
    width = config.intermediate_size if experts else config.shared_intermediate_size
    context = config.max_position_embeddings if turns else parts.CONTEXT
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if here else 0 for here in attends],
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
        "rope.scaling.finetuned": turns,
        "rope.dimension_count": head_dim_of(config),
        **parts.head_width(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if experts:
        own |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        own |= {"expert_shared_feed_forward_length": config.shared_intermediate_size}
    return parts.general(sizes, config.rms_norm_eps, width, context) | parts.mamba2_keys(sizes) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "model.embed_tokens.weight", "model.norm.weight")
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for layer in range(sizes.n_layer):
        name, block = f"model.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "input_layernorm.weight"])
        yield parts.Entry(f"{block}.ffn_norm.weight", tensors[name + "post_attention_layernorm.weight"])
        if name + "mamba.A_log" in tensors:
            yield from parts.mamba2_mixer(tensors, name + "mamba.", block, sizes.groups)
        else:
            for entry in parts.attention(tensors, name + "self_attn.", block):
                count = heads.get(entry.name.removeprefix(f"{block}."))
                if count is not None and _turns(config):
                    entry = entry._replace(tensor=parts.interleaved(entry.tensor, count))
                yield entry
        yield from _feed_forward(config, tensors, name, block)


def _turns(config: Any) -> bool:
    """Whether queries and keys have rotary positions."""
    return config.position_embedding_type == "rope"


def _feed_forward(config: Any, tensors: parts.Tensors, name: str, block: str) -> parts.Entries:
    """The shared MLP, and the experts beside it."""
    moe, end = name + "block_sparse_moe.", "_shexp" if config.num_local_experts else ""
    gate, up = tensors[name + "shared_mlp.input_linear.weight"].chunk(2)
    yield parts.Entry(f"{block}.ffn_gate{end}.weight", gate, True)
    yield parts.Entry(f"{block}.ffn_up{end}.weight", up, True)
    yield parts.Entry(f"{block}.ffn_down{end}.weight", tensors[name + "shared_mlp.output_linear.weight"], True)
    if end:
        yield parts.Entry(f"{block}.ffn_gate_inp.weight", tensors[moe + "router.weight"])
        gate, up = tensors[moe + "experts.gate_up_proj"].chunk(2, dim=1)
        yield parts.Entry(f"{block}.ffn_gate_exps.weight", gate, True)
        yield parts.Entry(f"{block}.ffn_up_exps.weight", up, True)
        yield parts.Entry(f"{block}.ffn_down_exps.weight", tensors[moe + "experts.down_proj"], True)
