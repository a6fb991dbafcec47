"""One layer of Mamba-1 in an ONNX graph: the same steps as `runtime/models/architectures/mamba1.py` takes in torch.

Time comes first, (L, B, ...), and the SSM state lies as (B, N, D), channels last, because that is what one step of
ONNX's `Scan` reads and writes without a transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ssmc.exporters.onnx.layers import GENAI, PORTABLE
from ssmc.exporters.onnx.ops.padding import Tokens
from ssmc.exporters.onnx.ops.parts import Layer, convolve, convolve_one, one_or_many, silu, softplus, subgraph, typed
from ssmc.exporters.onnx.ops.weights import Weights

TARGETS: tuple[str, ...] = (PORTABLE, GENAI)


def sizes(config: Any, tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
    """The sizes of a layer, read from its own tensors."""
    return sizes_at(f"backbone.layers.{layer}.mixer.", tensors)


def sizes_at(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The same of a mixer whose tensors' names start so."""
    d_inner, d_state = tensors[prefix + "A_log"].shape
    return {
        "d_inner": d_inner,
        "d_state": d_state,
        "dt_rank": tensors[prefix + "dt_proj.weight"].shape[1],
        "d_conv": tensors[prefix + "conv1d.weight"].shape[2],
    }


def states(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The states of a layer of these sizes, without the batch, by name."""
    return {
        "conv": (sizes["d_conv"] - 1, sizes["d_inner"]),  # the last inputs of the convolution, the newest at the end
        "ssm": (sizes["d_state"], sizes["d_inner"]),
    }


def mixer(op: OpBuilder, layer: Layer, hidden: ir.Value) -> tuple[ir.Value, dict[str, ir.Value]]:
    """What a mixer makes of (L, B, d_model), normed, and its states behind the last real token.

    Between in_proj and the gate there are two ways, for one token of every sequence and for any number of them.
    """
    weights, prefix, past, tokens = layer.weights, layer.prefix, layer.past, layer.tokens
    d_inner, n = weights.shape(prefix + "A_log")
    x, z = weights.linears(op, prefix + "in_proj", hidden, {"x": d_inner, "z": d_inner})  # (L, B, D)
    width = weights.shape(prefix + "conv1d.weight")[2]
    norms = getattr(layer.config, "selection_epsilon", None)
    y, conv, ssm = one_or_many(
        op,
        tokens,
        lambda op: _one_token(op, weights, prefix, x, past, norms),
        lambda op: _many_tokens(op, weights, prefix, x, past, tokens, norms),
        {"y": ("length", "batch", d_inner), "conv": ("batch", width - 1, d_inner), "ssm": ("batch", n, d_inner)},
    )
    y = op.Mul(y, silu(op, z))
    return weights.linear(op, prefix + "out_proj", y), {"conv": conv, "ssm": ssm}


def _one_token(
    op: OpBuilder, weights: Weights, prefix: str, x: ir.Value, past: Mapping[str, ir.Value], norms: float | None
) -> list[ir.Value]:
    """Decoding, where every operator costs more to start than to compute: y (1, B, D), conv and ssm."""
    u, conv = convolve_one(op, weights, prefix, x, past["conv"])  # (B, 1, D)
    u = silu(op, u)
    dt, B, C = _selection(op, weights, prefix, u, op.Softplus, norms)
    h, y = _step(op, past["ssm"], dt, op.Mul(dt, u), op.Transpose(B, perm=[0, 2, 1]), C, _decay(weights, prefix))
    y = op.Add(y, op.Mul(u, weights.float32(prefix + "D")))
    return [op.Transpose(y, perm=[1, 0, 2]), conv, h]


def _many_tokens(
    op: OpBuilder,
    weights: Weights,
    prefix: str,
    x: ir.Value,
    past: Mapping[str, ir.Value],
    tokens: Tokens,
    norms: float | None,
) -> list[ir.Value]:
    """A prompt or a piece of one: y (L, B, D), conv and ssm."""
    x, conv = convolve(op, weights, prefix, x, past["conv"], tokens)
    u = silu(op, x)
    dt, B, C = _selection(op, weights, prefix, u, lambda x: softplus(op, x), norms)
    dt = op.Mul(dt, tokens.moving)
    y, ssm = _scan(op, u, dt, B, C, past["ssm"], _decay(weights, prefix))
    return [op.Add(y, op.Mul(u, weights.float32(prefix + "D"))), conv, ssm]


def _selection(
    op: OpBuilder,
    weights: Weights,
    prefix: str,
    u: ir.Value,
    activate: Callable[[ir.Value], ir.Value],
    norms: float | None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What depends on the input (..., D): the time step (..., D), B and C (..., N); `norms`: the epsilon of Jamba's."""
    n, rank = weights.shape(prefix + "A_log")[1], weights.shape(prefix + "dt_proj.weight")[1]
    parts = weights.linear(op, prefix + "x_proj", u)
    low_rank, B, C = op.Split(parts, [rank, n, n], axis=-1, _outputs=3)
    if norms is not None:
        parts = {"dt": low_rank, "b": B, "c": C}
        low_rank, B, C = (
            op.RMSNormalization(part, weights.float32(f"{prefix}{name}_layernorm.weight"), axis=-1, epsilon=norms)
            for name, part in parts.items()
        )
    return activate(weights.linear(op, prefix + "dt_proj", low_rank)), B, C


def _decay(weights: Weights, prefix: str) -> ir.Value:
    """A, (N, D)."""
    return weights.float32(prefix + "A_log", lambda A_log: -torch.exp(A_log).t(), name_as=prefix + "A")


def _step(
    op: OpBuilder, h: ir.Value, dt: ir.Value, dt_u: ir.Value, B: ir.Value, C: ir.Value, A: ir.Value
) -> list[ir.Value]:
    """One step of the recurrence (Mamba, section 3.2): h (B, N, D) from that before, and C h (B, 1, D)."""
    h = op.Add(op.Mul(op.Exp(op.Mul(dt, A)), h), op.Mul(dt_u, B))
    return [h, op.MatMul(C, h)]


def _scan(
    op: OpBuilder, u: ir.Value, dt: ir.Value, B: ir.Value, C: ir.Value, past: ir.Value, A: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Step after step from `past` on: all C_t h_t, (L, B, D), and the last h, (B, N, D)."""
    n, d_inner = past.shape[1:]
    per_step = [op.Unsqueeze(dt, [2]), op.Unsqueeze(op.Mul(dt, u), [2]), op.Unsqueeze(B, [3]), op.Unsqueeze(C, [2])]
    shapes = {"h_before": (n, d_inner), "dt": (1, d_inner), "dt_u": (1, d_inner), "B": (n, 1), "C": (1, n)}
    body = subgraph(
        op,
        "step",
        lambda op, h, dt, dt_u, B, C: _step(op, h, dt, dt_u, B, C, A),
        inputs=[typed(name, "batch", *shape) for name, shape in shapes.items()],
        outputs=[typed("h", "batch", n, d_inner), typed("y", "batch", 1, d_inner)],
    )
    ssm, y = op.Scan(past, *per_step, body=body, num_scan_inputs=len(per_step), _outputs=2)
    return op.Squeeze(y, [2]), ssm
