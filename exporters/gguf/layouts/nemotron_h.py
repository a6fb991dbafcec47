"""Nemotron-H in llama.cpp: every layer is a Mamba-2, attention without positions, an MLP, or experts."""

from __future__ import annotations

import math
from typing import Any

from ssmc.exporters.gguf import parts

NAME = __name__.rpartition(".")[2]  # llama.cpp calls it as transformers does


def name(config: Any) -> str:
    """Of the architecture: models with experts have one of their own."""
    return f"{NAME}_moe" if "moe" in config.layers_block_type else NAME


def adapt(model: Any) -> str | None:
    """Take the least time step out of a model, which transformers has and llama.cpp has not."""
    least = float(model.config.time_step_min)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    return f"llama.cpp does not limit time steps, transformers lets them be {least} at least"


def refusal(config: Any, sizes: Any) -> str | None:
    """Experts that llama.cpp chooses in the same way, no biases."""
    if "moe" in config.layers_block_type:
        if "mlp" in config.layers_block_type:
            return "llama.cpp takes MLPs or experts in such a model, not both"
        if config.moe_latent_size or config.n_group > 1:
            return "experts in groups, or with a latent size, are not written yet"
    if config.use_bias or config.mamba_proj_bias or config.attention_bias or config.mlp_bias:
        return "biases of its linear maps are not written yet"
    activation = parts.refused_activation(config, "mlp_hidden_act", ("relu2",))
    return activation or parts.refused_activation(config, "mamba_hidden_act")


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    kinds = config.layers_block_type
    width = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
    widths = [width.get(kind, 0) for kind in kinds]
    own = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        **parts.head_width(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),  # asked for, beside that of RMS norms
    }
    if "moe" in kinds:
        own |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_count": config.n_shared_experts,
            "expert_group_count": config.n_group,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_weights_scale": float(config.routed_scaling_factor),
        }
    return parts.general(sizes, config.layer_norm_epsilon, widths) | parts.mamba2_keys(sizes) | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "model.embeddings.weight", "model.norm_f.weight")
    for layer, kind in enumerate(config.layers_block_type):
        prefix, block = f"model.layers.{layer}.mixer.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[f"model.layers.{layer}.norm.weight"])
        if kind == "full_attention":
            yield from parts.attention(tensors, prefix, block)
        elif kind == "mlp":
            yield from parts.linear(tensors, prefix + "up_proj", f"{block}.ffn_up")
            yield from parts.linear(tensors, prefix + "down_proj", f"{block}.ffn_down")
        elif kind == "moe":
            yield parts.Entry(f"{block}.ffn_gate_inp.weight", tensors[prefix + "gate.weight"])
            yield parts.Entry(f"{block}.exp_probs_b.bias", tensors[prefix + "gate.e_score_correction_bias"])
            for part in ("up", "down"):
                yield parts.Entry(f"{block}.ffn_{part}_exps.weight", tensors[f"{prefix}experts.{part}_proj"], True)
                yield from parts.linear(tensors, f"{prefix}shared_experts.{part}_proj", f"{block}.ffn_{part}_shexp")
        else:
            yield from parts.mamba2_mixer(tensors, prefix, block, sizes.groups)
