"""One layer of Mamba-2 in an ONNX graph: the same steps as `runtime/architectures/mamba2.py` takes in torch.

Time comes first, (L, B, ...), until the scan; the SSM state lies as (B, H, N, P), a matrix for each head, because that
is what products of matrices and onnxruntime's LinearAttention read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from . import ssd
from .padding import Tokens
from .parts import convolve, convolve_one, one_or_many, silu
from .ssd import Heads, Inputs
from .weights import Weights

TARGETS = ("portable", "ort")  # ort: LinearAttention decodes


def sizes(config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
    """The sizes of a layer, read from its own tensors; only how many groups there are is not to be seen in them."""
    prefix = f"backbone.layers.{layer}.mixer."
    d_inner, heads = tensors[prefix + "norm.weight"].shape[0], tensors[prefix + "A_log"].shape[0]
    channels, _, d_conv = tensors[prefix + "conv1d.weight"].shape
    return {
        "d_inner": d_inner,
        "d_state": (channels - d_inner) // (2 * config.n_groups),
        "heads": heads,
        "head_dim": d_inner // heads,
        "n_groups": config.n_groups,
        "d_conv": d_conv,
    }


def states(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The states of a layer of these sizes, without the batch, by name."""
    channels = sizes["d_inner"] + 2 * sizes["n_groups"] * sizes["d_state"]
    return {
        "conv": (sizes["d_conv"] - 1, channels),  # the last inputs of the convolution, the newest at the end
        "ssm": (sizes["heads"], sizes["d_state"], sizes["head_dim"]),
    }


@dataclass(frozen=True)
class _Mixer:
    """One mixer: what everything below reads."""

    weights: Weights
    prefix: str
    heads: Heads
    tokens: Tokens
    config: Any
    target: str

    def rate(self) -> ir.Value:
        """A, (H,)."""
        return self.weights.float32(self.prefix + "A_log", lambda A_log: -torch.exp(A_log), name_as=self.prefix + "A")

    def skip(self) -> ir.Value:
        """D, (H, 1, 1)."""
        return self.weights.float32(self.prefix + "D", lambda D: D[:, None, None])


def mixer(
    op: OpBuilder,
    weights: Weights,
    prefix: str,
    hidden: ir.Value,
    past: Mapping[str, ir.Value],
    tokens: Tokens,
    config: Any,
    target: str,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """What a mixer makes of (L, B, d_model), and its states behind the last real token.

    Between in_proj and the gate there are two ways, for one token of every sequence and for any number of them.

    Args:
        op: of the graph.
        weights: of the model.
        prefix: how the names of the mixer's tensors start.
        hidden: (L, B, d_model), normed.
        past: states by name, as `states` lays them out.
        tokens: which of them are real.
        config: transformers' configuration.
        target: of `TARGETS`.
    """
    h, n, p = past["ssm"].shape[1:]
    width, channels = past["conv"].shape[1:]
    this = _Mixer(weights, prefix, Heads(h, p, n, config.n_groups), tokens, config, target)
    parts = weights.linear(op, prefix + "in_proj", hidden)
    z, x, dt = op.Split(parts, [h * p, channels, h], axis=-1, _outputs=3)  # (L, B, D), (L, B, D + 2 G N), (L, B, H)
    dt = _time_step(op, this, dt)
    y, conv, ssm = one_or_many(
        op,
        tokens,
        lambda op: _one_token(op, this, x, dt, past),
        lambda op: _many_tokens(op, this, x, dt, past),
        {"y": ("length", "batch", h * p), "conv": ("batch", width, channels), "ssm": ("batch", h, n, p)},
    )
    y = _gated_norm(op, this, y, z)
    return weights.linear(op, prefix + "out_proj", y), {"conv": conv, "ssm": ssm}


def _time_step(op: OpBuilder, this: _Mixer, dt: ir.Value) -> ir.Value:
    """The time steps (L, B, H), 0 behind the last real token: there the states stay as they are."""
    dt = op.Softplus(op.Add(dt, this.weights.float32(this.prefix + "dt_bias")))
    low, high = (float(limit) for limit in this.config.time_step_limit)
    if low > 0:
        dt = op.Max(dt, low)
    if math.isfinite(high):
        dt = op.Min(dt, high)
    return op.Mul(dt, this.tokens.moving)


def _one_token(op: OpBuilder, this: _Mixer, x: ir.Value, dt: ir.Value, past: Mapping[str, ir.Value]) -> list[ir.Value]:
    """Decoding, where every operator costs more to start than to compute: y (1, B, D), conv and ssm."""
    heads = this.heads
    u, conv = convolve_one(op, this.weights, this.prefix, x, past["conv"], this.tokens)  # (B, 1, D + 2 G N)
    u, B, C = op.Split(silu(op, u), heads.split, axis=-1, _outputs=3)
    inputs = Inputs(u, op.Transpose(dt, perm=[1, 0, 2]), B, C, this.rate(), this.skip())
    step = ssd.linear_attention if this.target == "ort" else ssd.step
    y, h = step(op, heads, inputs, past["ssm"])
    return [op.Transpose(y, perm=[1, 0, 2]), conv, h]


def _many_tokens(
    op: OpBuilder, this: _Mixer, x: ir.Value, dt: ir.Value, past: Mapping[str, ir.Value]
) -> list[ir.Value]:
    """A prompt or a piece of one: y (L, B, D), conv and ssm."""
    heads = this.heads
    chunks = ssd.chunks_of(op, x)
    tail = chunks.zeros(op, this.tokens.batch, sum(heads.split))
    x, conv = convolve(op, this.weights, this.prefix, x, past["conv"], this.tokens, tail)
    u, B, C = op.Split(silu(op, x), heads.split, axis=-1, _outputs=3)
    dt = op.Concat(dt, chunks.zeros(op, this.tokens.batch, heads.heads), axis=0)
    y, h = ssd.chunked(op, heads, chunks, Inputs(u, dt, B, C, this.rate(), this.skip()), past["ssm"])
    return [y, conv, h]


def _gated_norm(op: OpBuilder, this: _Mixer, y: ir.Value, z: ir.Value) -> ir.Value:
    """RMSNorm of y silu(z), (L, B, D), over the channels of each group; the gate acts before the norm."""
    y, groups = op.Mul(y, silu(op, z)), this.heads.groups
    name, epsilon = this.prefix + "norm.weight", float(this.config.layer_norm_epsilon)
    if groups == 1:
        return op.RMSNormalization(y, this.weights.float32(name), axis=-1, epsilon=epsilon)
    width = this.heads.d_inner // groups
    by_group = op.Reshape(y, [0, 0, groups, width])
    ones = op.Expand(1.0, [width])
    normed = op.Reshape(op.RMSNormalization(by_group, ones, axis=-1, epsilon=epsilon), [0, 0, groups * width])
    return op.Mul(normed, this.weights.float32(name))
