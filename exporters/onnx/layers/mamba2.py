"""One layer of Mamba-2 in an ONNX graph: the same steps as `runtime/models/architectures/mamba2.py` takes in torch.

Time comes first, (L, B, ...), until the scan; the SSM state lies as (B, H, N, P), a matrix for each head, because that
is what products of matrices and onnxruntime's LinearAttention read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.layers import GENAI, ORT, PORTABLE
from ssmc.exporters.onnx.ops import ssd
from ssmc.exporters.onnx.ops.parts import Layer, convolve, convolve_one, one_or_many, silu
from ssmc.exporters.onnx.ops.ssd import Heads, Inputs

TARGETS = (PORTABLE, ORT, GENAI)  # ORT: LinearAttention decodes


def sizes(config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
    """The sizes of a layer, read from its own tensors; only how many groups there are is not to be seen in them."""
    return sizes_at(f"backbone.layers.{layer}.mixer.", tensors, config.n_groups)


def sizes_at(prefix: str, tensors: Mapping[str, torch.Tensor], groups: int) -> dict[str, int]:
    """The same of a mixer whose tensors' names start so."""
    d_inner, heads = tensors[prefix + "out_proj.weight"].shape[1], tensors[prefix + "A_log"].shape[0]
    channels, _, d_conv = tensors[prefix + "conv1d.weight"].shape
    return {
        "d_inner": d_inner,
        "d_state": (channels - d_inner) // (2 * groups),
        "heads": heads,
        "head_dim": d_inner // heads,
        "n_groups": groups,
        "d_conv": d_conv,
    }


def states(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The states of a layer of these sizes, without the batch, by name."""
    channels = sizes["d_inner"] + 2 * sizes["n_groups"] * sizes["d_state"]
    return {
        "conv": (sizes["d_conv"] - 1, channels),  # the last inputs of the convolution, the newest at the end
        "ssm": (sizes["heads"], sizes["d_state"], sizes["head_dim"]),
    }


def mixer(op: OpBuilder, layer: Layer, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
    """What a mixer makes of (L, B, d_model), normed, and its states behind the last real token.

    As in Mamba-1 there are two ways between in_proj and the gate.
    """
    heads, (width, channels) = _heads(layer), layer.past["conv"].shape[1:]
    parts = layer.weights.linear(op, layer.prefix + "in_proj", hidden)
    sizes = [heads.d_inner, channels, heads.heads]
    z, x, dt = op.Split(parts, sizes, axis=-1, _outputs=3)  # (L, B, D), (L, B, D + 2 G N), (L, B, H)
    dt = _time_step(op, layer, dt)
    y, conv, ssm = one_or_many(
        op,
        layer.tokens,
        lambda op: _one_token(op, layer, x, dt),
        lambda op: _many_tokens(op, layer, x, dt),
        {
            "y": ("length", "batch", heads.d_inner),
            "conv": ("batch", width, channels),
            "ssm": ("batch", *layer.past["ssm"].shape[1:]),
        },
    )
    y = _gated_norm(op, layer, y, z)
    return layer.weights.linear(op, layer.prefix + "out_proj", y), {"conv": conv, "ssm": ssm}


def _heads(layer: Layer) -> Heads:
    heads, d_state, head_dim = layer.past["ssm"].shape[1:]
    return Heads(heads, head_dim, d_state, layer.config.n_groups)


def _rate_and_skip(layer: Layer) -> tuple[ir.Value, ir.Value]:
    """A (H,) and D (H, 1, 1)."""
    rate = layer.weights.float32(layer.prefix + "A_log", lambda A_log: -torch.exp(A_log), name_as=layer.prefix + "A")
    return rate, layer.weights.float32(layer.prefix + "D", lambda D: D[:, None, None])


def _time_step(op: OpBuilder, layer: Layer, dt: ir.Value) -> ir.Value:
    """The time steps (L, B, H), 0 behind the last real token: there the states stay as they are."""
    dt = op.Softplus(op.Add(dt, layer.weights.float32(layer.prefix + "dt_bias")))
    low, high = (float(limit) for limit in layer.config.time_step_limit)
    if low > 0:
        dt = op.Max(dt, low)
    if math.isfinite(high):
        dt = op.Min(dt, high)
    return op.Mul(dt, layer.tokens.moving)


def _one_token(op: OpBuilder, layer: Layer, x: ir.Value, dt: ir.Value) -> list[ir.Value]:
    """Decoding, where every operator costs more to start than to compute: y (1, B, D), conv and ssm."""
    heads = _heads(layer)
    u, conv = convolve_one(op, layer.weights, layer.prefix, x, layer.past["conv"])  # (B, 1, D + 2 G N)
    u, B, C = op.Split(silu(op, u), heads.split, axis=-1, _outputs=3)
    inputs = Inputs(u, op.Transpose(dt, perm=[1, 0, 2]), B, C, *_rate_and_skip(layer))
    step = ssd.linear_attention if layer.target == ORT else ssd.step
    y, h = step(op, heads, inputs, layer.past["ssm"])
    return [op.Transpose(y, perm=[1, 0, 2]), conv, h]


def _many_tokens(op: OpBuilder, layer: Layer, x: ir.Value, dt: ir.Value) -> list[ir.Value]:
    """A prompt or a piece of one: y (L, B, D), conv and ssm."""
    heads = _heads(layer)
    chunks = ssd.chunks_of(op, x)
    tail = chunks.zeros(op, layer.tokens.batch, sum(heads.split))
    x, conv = convolve(op, layer.weights, layer.prefix, x, layer.past["conv"], layer.tokens, tail)
    u, B, C = op.Split(silu(op, x), heads.split, axis=-1, _outputs=3)
    dt = op.Concat(dt, chunks.zeros(op, layer.tokens.batch, heads.heads), axis=0)
    y, h = ssd.chunked(op, heads, chunks, Inputs(u, dt, B, C, *_rate_and_skip(layer)), layer.past["ssm"])
    return [y, conv, h]


def _gated_norm(op: OpBuilder, layer: Layer, y: ir.Value, z: ir.Value) -> ir.Value:
    """RMSNorm of y silu(z), (L, B, D), over the channels of each group.

    The gate acts before the norm; in a Falcon-H1 it may act behind it, or there is no norm.
    """
    order = getattr(layer.config, "gated_norm", "gate first")
    gate = silu(op, z)
    if order == "none":
        return op.Mul(y, gate)
    return _norm(op, layer, op.Mul(y, gate)) if order == "gate first" else op.Mul(_norm(op, layer, y), gate)


def _norm(op: OpBuilder, layer: Layer, y: ir.Value) -> ir.Value:
    heads = _heads(layer)
    name, epsilon = layer.prefix + "norm.weight", float(layer.config.layer_norm_epsilon)
    if heads.groups == 1:
        return op.RMSNormalization(y, layer.weights.float32(name), axis=-1, epsilon=epsilon)
    width = heads.d_inner // heads.groups
    by_group = op.Reshape(y, [0, 0, heads.groups, width])
    ones = op.Expand(1.0, [width])
    normed = op.Reshape(op.RMSNormalization(by_group, ones, axis=-1, epsilon=epsilon), [0, 0, heads.d_inner])
    return op.Mul(normed, layer.weights.float32(name))
