"""Attention of a hybrid in an ONNX graph, in standard operators: rotary positions, grouped queries, a growing cache.

Keys and values of all tokens so far come in and go out, (B, KV heads, tokens, head_dim). Which of them are real is a
state of its own, since rows of a batch may have been padded anywhere: padding that was read stays in the cache and is
never looked at. Time comes first outside, (L, B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.ops.padding import Tokens
from ssmc.exporters.onnx.ops.weights import Weights
from ssmc.runtime.errors import CheckpointError

_HIDDEN = -1e30  # what is added to the score of a token that must not be seen
_FIXED_ROPES = ("linear", "llama3", "yarn")  # whose frequencies do not depend on the length


@dataclass(frozen=True)
class Seen:
    """What all attention layers of a graph share.

    Attributes:
        bias: (B, 1, 1, L, past + L) float32, added to the scores.
        cos, sin: (B, 1, L, rotated) float32; None without rotary positions.
        length: L, int64, one element.
        rotated: how many numbers of a head are rotated.
        place: (B, 1, L, 1) int64, where the token that was given at each place stands, if the cache keeps them as they
            were given; None: it keeps the real ones of every call first.
    """

    bias: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    length: ir.Value
    rotated: int = 0
    place: ir.Value | None = None


@dataclass(frozen=True)
class AttentionSizes:
    """Of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float


def see(
    op: OpBuilder, input_ids: ir.Value, tokens: Tokens, past_mask: ir.Value, rope: tuple[torch.Tensor, float] | None
) -> tuple[Seen, ir.Value]:
    """Which tokens see which, and where they stand.

    Args:
        op: of the graph.
        input_ids: (B, L).
        tokens: the real ones first.
        past_mask: (B, past) float32, 1 at real tokens of the cache.
        rope: frequencies (rotated / 2,) and the factor of cosine and sine; None without rotary positions.

    Returns:
        What layers share, and the mask (B, past + L) of the cache after these tokens.
    """
    length = op.Shape(input_ids, start=1, end=2)
    position = op.Range(0, op.Squeeze(length, [0]), 1)  # among the tokens of this call, real ones first
    places = (
        op.Transpose(tokens.place, perm=[1, 0]) if tokens.kept_as_given else op.Unsqueeze(position, [0])
    )  # (B or 1, L)
    later = op.Less(op.Unsqueeze(position, [1]), op.Unsqueeze(places, [1]))  # (B or 1, L, L): the second is later
    own = op.Where(later, _HIDDEN, 0.0)  # behind the last real token nobody looks, and padding stands there
    cached = op.Unsqueeze(op.Mul(op.Sub(1.0, past_mask), _HIDDEN), [1])  # (B, 1, past)
    shape = op.Concat(tokens.batch, length, length, axis=0)
    before = op.Expand(cached, op.Concat([1], length, [1], axis=0))
    bias = op.Unsqueeze(op.Concat(before, op.Expand(own, shape), axis=2), [1, 2])
    after = op.Concat(past_mask, op.Transpose(op.Squeeze(tokens.moving, [2]), perm=[1, 0]), axis=1)
    place = op.Unsqueeze(places, [1, 3]) if tokens.kept_as_given else None
    if rope is None:
        return Seen(bias, None, None, length, place=place), after
    frequencies, factor = rope
    start = op.ReduceSum(past_mask, [1], keepdims=1)  # (B, 1): how many real tokens came before
    turns = op.Add(start, op.Cast(op.Unsqueeze(position, [0]), to=ir.DataType.FLOAT))  # (B, L)
    angles = op.Mul(op.Unsqueeze(turns, [2]), op.Constant(value=ir.tensor(frequencies.numpy())))
    angles = op.Unsqueeze(op.Concat(angles, angles, axis=2), [1])  # (B, 1, L, rotated)
    cos, sin = op.Mul(op.Cos(angles), factor), op.Mul(op.Sin(angles), factor)
    return Seen(bias, cos, sin, length, 2 * len(frequencies), place), after


def attend(
    op: OpBuilder,
    weights: Weights,
    prefix: str,
    hidden: ir.Value,
    past: Mapping[str, ir.Value],
    seen: Seen,
    sizes: AttentionSizes,
    project: Callable[[str, ir.Value], ir.Value] | None = None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """What an attention layer makes of (L, B, d_model), and keys and values of all tokens so far.

    `project` applies q_proj, k_proj and v_proj where they are more than linear maps.
    """
    heads, groups, width = sizes.heads, sizes.heads // sizes.kv_heads, sizes.head_dim

    def split(name: str, count: int) -> ir.Value:
        y = weights.linear(op, prefix + name, hidden) if project is None else project(name, hidden)
        x = op.Reshape(y, [0, 0, count, width])
        return op.Transpose(x, perm=[1, 2, 0, 3])  # (B, heads, L, head_dim)

    q, k, v = split("q_proj", heads), split("k_proj", sizes.kv_heads), split("v_proj", sizes.kv_heads)
    q, k = _rotated(op, q, seen, width), _rotated(op, k, seen, width)
    if seen.place is not None:
        at = op.Expand(seen.place, op.Shape(k))
        k, v = op.GatherElements(k, at, axis=2), op.GatherElements(v, at, axis=2)
    keys, values = op.Concat(past["key"], k, axis=2), op.Concat(past["value"], v, axis=2)
    # the queries of a group stand one below the other: one product for each head of the keys
    q = op.Reshape(op.Mul(q, sizes.scale), [0, sizes.kv_heads, -1, width])
    scores = op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2]))  # (B, KV, groups L, T)
    shape = op.Concat([0, sizes.kv_heads, groups], seen.length, [-1], axis=0)
    scores = op.Add(op.Reshape(scores, shape), seen.bias)  # (B, KV, groups, L, T)
    flat = op.Concat([0, sizes.kv_heads], op.Mul(seen.length, [groups]), [-1], axis=0)
    chosen = op.Reshape(op.Softmax(scores, axis=-1), flat)
    y = op.Reshape(op.MatMul(chosen, values), op.Concat([0, heads], seen.length, [width], axis=0))
    y = op.Reshape(op.Transpose(y, perm=[2, 0, 1, 3]), [0, 0, heads * width])  # (L, B, heads head_dim)
    return weights.linear(op, f"{prefix}o_proj", y), {"key": keys, "value": values}


def _rotated(op: OpBuilder, x: ir.Value, seen: Seen, width: int) -> ir.Value:
    """Rotary positions (RoFormer, equation 34), on the first `rotated` of (B, heads, L, head_dim)."""
    if seen.cos is None or seen.sin is None:
        return x
    rotated, half = seen.rotated, seen.rotated // 2
    parts = [half, half, width - rotated] if width > rotated else [half, half]
    first, second, *rest = op.Split(x, parts, axis=-1, _outputs=len(parts))
    turned = op.Concat(op.Neg(second), first, axis=-1)
    both = op.Concat(first, second, axis=-1) if rest else x
    y = op.Add(op.Mul(both, seen.cos), op.Mul(turned, seen.sin))
    return op.Concat(y, *rest, axis=-1) if rest else y


def rope_of(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies of rotary positions (rotated / 2,), and the factor of cosine and sine, as transformers takes them.

    Raises:
        CheckpointError: they depend on the length.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.rope_parameters
    kind = settings["rope_type"]
    if kind == "default":
        size = int(head_dim * settings.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / (settings["rope_theta"] ** exponents), 1.0
    if kind not in _FIXED_ROPES:
        raise CheckpointError(
            f"There is no ONNX graph for rotary positions of the kind {kind!r}, which depend on the length. Export to "
            "another format."
        )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return frequencies.float(), float(factor)
