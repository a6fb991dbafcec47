"""Mamba-1 in llama.cpp."""

from __future__ import annotations

from typing import Any

from ssmc.exporters.gguf import parts


def refusal(config: Any, sizes: Any) -> str | None:
    """d_inner is twice d_model, the activation silu, and no linear map has a bias."""
    if sizes.d_inner != 2 * sizes.d_model:
        return f"llama.cpp takes a d_inner of 2 x d_model only, that is {2 * sizes.d_model}, here it is {sizes.d_inner}"
    if config.use_bias:
        return "llama.cpp has no biases in in_proj and out_proj"
    return parts.refused_activation(config)


def keys(config: Any, sizes: Any) -> parts.Keys:
    """Sizes and constants."""
    mixer = parts.mamba1_keys(sizes.d_inner, sizes.d_state, sizes.dt_rank, sizes.d_conv)
    own = {"attention.head_count": 0, "ssm.dt_b_c_rms": False}
    return parts.general(sizes, config.layer_norm_epsilon) | mixer | own


def entries(config: Any, sizes: Any, tensors: parts.Tensors, selection: float = 1.0) -> parts.Entries:
    """All tensors; `selection` is a factor of x_proj."""
    yield from parts.outside(tensors, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for layer in range(sizes.n_layer):
        name, block = f"backbone.layers.{layer}.", f"blk.{layer}"
        yield parts.Entry(f"{block}.attn_norm.weight", tensors[name + "norm.weight"])
        yield from parts.mamba1_mixer(tensors, name + "mixer.", block, selection)
