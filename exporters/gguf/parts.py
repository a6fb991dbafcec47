"""What the files of several families share: tensors of mixers, attention and MLPs as llama.cpp names and lays them.

A tensor is given as (name in the file, tensor, whether it may be quantised). Norms, biases, convolutions, A and D stay
float32. A = -exp(A_log) is computed in float32 whatever the checkpoint holds: in float16 the logits move by 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ssmc.runtime.models.architectures.units import head_dim_of

CONTEXT = 2**20  # of a model without positions: the most llama.cpp offers


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    tensor: torch.Tensor
    large: bool = False  # may be quantised


Entries = Iterator[Entry]
Tensors = Mapping[str, torch.Tensor]
Keys = dict[str, Any]
"""Keys of a file without the architecture that stands before each: "ssm.state_size" -> a number, or one a layer."""


def plain(tensors: Tensors, name: str, target: str, large: bool = False) -> Entries:
    """A tensor as it is, if there is one."""
    if name in tensors:
        yield Entry(target, tensors[name], large)


def linear(tensors: Tensors, name: str, target: str, factor: float = 1.0) -> Entries:
    """Weight and bias of a linear map, times a factor."""
    for end, large in ((".weight", True), (".bias", False)):
        if name + end in tensors:
            tensor = tensors[name + end]
            yield Entry(target + end, tensor if factor == 1.0 else tensor.float() * factor, large)


def outside(
    tensors: Tensors, embedding: str, final_norm: str, scale_embedding: float = 1.0, scale_head: float = 1.0
) -> Entries:
    """Embedding, last norm and head; a tied head is left out, unless the factors differ."""
    table, head = tensors[embedding], tensors.get("lm_head.weight")
    if head is None and scale_embedding != scale_head:
        head = table
    yield Entry("token_embd.weight", table if scale_embedding == 1.0 else table.float() * scale_embedding, True)
    yield Entry("output_norm.weight", tensors[final_norm])
    if head is not None:
        yield Entry("output.weight", head if scale_head == 1.0 else head.float() * scale_head, True)


def convolution(tensors: Tensors, prefix: str, block: str) -> Entries:
    """conv1d: (channels, K). llama.cpp always adds a bias."""
    weight = tensors[prefix + "conv1d.weight"][:, 0]
    yield Entry(f"{block}.ssm_conv1d.weight", weight)
    bias = tensors.get(prefix + "conv1d.bias")
    yield Entry(f"{block}.ssm_conv1d.bias", torch.zeros(len(weight)) if bias is None else bias)


def mamba1_mixer(tensors: Tensors, prefix: str, block: str, selection: float = 1.0) -> Entries:
    """A Mamba-1 mixer, with norms on dt, B and C where there are some; `selection` is a factor of x_proj."""
    yield from linear(tensors, prefix + "in_proj", f"{block}.ssm_in")
    yield from convolution(tensors, prefix, block)
    yield from linear(tensors, prefix + "x_proj", f"{block}.ssm_x", selection)
    for name in ("dt", "b", "c"):
        yield from plain(tensors, f"{prefix}{name}_layernorm.weight", f"{block}.ssm_{name}_norm.weight")
    yield Entry(f"{block}.ssm_dt.weight", tensors[prefix + "dt_proj.weight"])
    yield Entry(f"{block}.ssm_dt.bias", tensors[prefix + "dt_proj.bias"])
    yield Entry(f"{block}.ssm_a", -torch.exp(tensors[prefix + "A_log"].float()))
    yield Entry(f"{block}.ssm_d", tensors[prefix + "D"])
    yield from linear(tensors, prefix + "out_proj", f"{block}.ssm_out")


def mamba2_mixer(
    tensors: Tensors, prefix: str, block: str, groups: int, rows: torch.Tensor | None = None, factor: float = 1.0
) -> Entries:
    """A Mamba-2 mixer.

    Args:
        tensors: by transformers' names.
        prefix: of the mixer's.
        block: of the names in the file.
        groups: how many groups of heads have a norm of their own.
        rows: (outputs of in_proj,) factors of its rows; None: none.
        factor: of out_proj.
    """
    weight, bias = tensors[prefix + "in_proj.weight"], tensors.get(prefix + "in_proj.bias")
    yield Entry(f"{block}.ssm_in.weight", weight if rows is None else weight.float() * rows[:, None], True)
    if bias is not None:
        yield Entry(f"{block}.ssm_in.bias", bias)
    yield from convolution(tensors, prefix, block)
    yield Entry(f"{block}.ssm_dt.bias", tensors[prefix + "dt_bias"])
    yield Entry(f"{block}.ssm_a", -torch.exp(tensors[prefix + "A_log"].float())[:, None])
    yield Entry(f"{block}.ssm_d", tensors[prefix + "D"][:, None])
    if prefix + "norm.weight" in tensors:
        yield Entry(f"{block}.ssm_norm.weight", tensors[prefix + "norm.weight"].view(groups, -1))
    yield from linear(tensors, prefix + "out_proj", f"{block}.ssm_out", factor)


def attention(tensors: Tensors, prefix: str, block: str, factors: Mapping[str, float] | None = None) -> Entries:
    """Queries, keys, values and output of a layer of attention, each times its factor."""
    for name, target in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        yield from linear(tensors, f"{prefix}{name}_proj", f"{block}.{target}", (factors or {}).get(name, 1.0))


def interleaved(weight: torch.Tensor, heads: int, turned: int | None = None) -> torch.Tensor:
    """Rows of queries or keys (heads P, d) for llama.cpp's normal rotary positions, which turn neighbours.

    transformers turns pairs that lie half a head apart.

    Args:
        weight: of the linear map.
        heads: of queries, or of keys.
        turned: how many numbers of a head positions turn, the first ones; None: all.
    """
    by_head = weight.view(heads, -1, weight.shape[1])
    turned = by_head.shape[1] if turned is None else turned
    first = by_head[:, :turned].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, by_head[:, turned:]], dim=1).reshape(weight.shape)


def refused_time_steps(config: Any) -> str | None:
    """Why limits of the time step cannot be expressed."""
    low, high = config.time_step_limit
    if low <= 0 and math.isinf(high):
        return None
    return f"llama.cpp does not limit time steps, this model limits them to {low} to {high}"


def mamba1_keys(d_inner: int, d_state: int, dt_rank: int, d_conv: int) -> Keys:
    """Sizes of Mamba-1 mixers."""
    return {
        "ssm.conv_kernel": d_conv,
        "ssm.inner_size": d_inner,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": dt_rank,
    }


def mamba2_keys(sizes: Any) -> Keys:
    """Sizes of Mamba-2 mixers; the number of heads stands where Mamba-1 has dt_rank."""
    keys = mamba1_keys(sizes.d_inner, sizes.d_state, sizes.heads, sizes.d_conv)
    return keys | {"ssm.group_count": sizes.groups}


def general(sizes: Any, epsilon: float, feed_forward: int | Sequence[int] = 0, context: int = CONTEXT) -> Keys:
    """What every file says."""
    return {
        "context_length": context,
        "embedding_length": sizes.d_model,
        "block_count": sizes.n_layer,
        "feed_forward_length": feed_forward,
        "attention.layer_norm_rms_epsilon": float(epsilon),
        "vocab_size": sizes.vocab_size,
    }


def head_width(config: Any) -> Keys:
    """Channels of an attention head, which pruned heads leave as they are; llama.cpp would take d_model over heads."""
    width = head_dim_of(config)
    return {"attention.key_length": width, "attention.value_length": width}


def refused_width(sizes: Any, experts: bool = False) -> str | None:
    """Why a d_inner cannot be expressed where llama.cpp asserts that it is twice d_model.

    Args:
        sizes: of the model.
        experts: whether it has experts, beside which d_model stays.
    """
    if sizes.d_inner == 2 * sizes.d_model:
        return None
    together = "heads can go together with d_model alone (--pattern head+width)"
    return (
        f"llama.cpp takes a d_inner of 2 x d_model only, that is {2 * sizes.d_model}, here it is {sizes.d_inner}: "
        f"{'heads have to stay' if experts else together}"
    )


def refused_activation(
    config: Any, name: str = "hidden_act", wanted: tuple[str, ...] = ("silu", "swish")
) -> str | None:
    """Why an activation cannot be expressed."""
    found = getattr(config, name, wanted[0])
    return None if found in wanted else f"llama.cpp computes {wanted[0]} there, this model {found}"
