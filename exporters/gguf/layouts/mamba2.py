"""Mamba-2 in llama.cpp: any whole number of heads."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts


def refusal(config: Any, sizes: Any) -> str | None:
    """No limits of the time step, silu, no biases."""
    if config.use_bias:
        return "llama.cpp has no biases in in_proj and out_proj"
    return parts.refused_time_steps(config) or parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    return parts.general(sizes, config.layer_norm_epsilon) | parts.mamba2_keys(sizes) | {"attention.head_count": 0}


def entries(config: Any, sizes: Any, tensors: parts.Tensors) -> parts.Entries:
    """All tensors."""
    yield from parts.outside(tensors, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for layer in range(sizes.n_layer):
        name, block = f"backbone.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "norm.weight"])
        yield from parts.mamba2_mixer(tensors, name + "mixer.", block, sizes.groups)
