"""One layer of Mamba-1 in an ONNX graph: the same steps as `runtime/architectures/mamba.py` takes in torch.

Time comes first, (L, B, ...), and the SSM state lies as (B, N, D), channels last, because that is what one step of
ONNX's `Scan` reads and writes without a transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from .padding import Tokens, window_rows
from .weights import Weights

END = 2**63 - 1  # of a slice that goes to the end
SMALLEST = 1e-30  # for w - 1 where e is below the resolution of 1 + e: log(w) is 0 there, and so is the time step


def sizes(tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, int]:
    """The sizes of a layer, read from its own tensors."""
    prefix = f"backbone.layers.{layer}.mixer."
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


def mixer(
    op: OpBuilder, weights: Weights, prefix: str, hidden: ir.Value, past: Mapping[str, ir.Value], tokens: Tokens
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """What a mixer makes of (L, B, d_model), and its states behind the last real token.

    Args:
        op: of the graph.
        weights: of the model.
        prefix: how the names of the mixer's tensors start.
        hidden: (L, B, d_model), normed.
        past: states by name, as `states` lays them out.
        tokens: which of them are real.
    """
    d_inner, n = weights.shape(prefix + "A_log")
    rank = weights.shape(prefix + "dt_proj.weight")[1]
    x = weights.linear(op, prefix + "in_proj", hidden, rows=slice(0, d_inner))  # (L, B, D)
    z = weights.linear(op, prefix + "in_proj", hidden, rows=slice(d_inner, 2 * d_inner))
    x, conv = _convolve(op, weights, prefix + "conv1d", x, past["conv"], tokens)
    u = _silu(op, x)
    low_rank = weights.linear(op, prefix + "x_proj", u, rows=slice(0, rank))
    B = weights.linear(op, prefix + "x_proj", u, rows=slice(rank, rank + n))  # (L, B, N)
    C = weights.linear(op, prefix + "x_proj", u, rows=slice(rank + n, rank + 2 * n))
    dt = _softplus(op, weights.linear(op, prefix + "dt_proj", low_rank))
    dt = op.Mul(dt, tokens.moving)  # a time step of 0: the state stays as it is
    A = weights.float32(prefix + "A_log", lambda A_log: -torch.exp(A_log).t(), name_as=prefix + "A")  # (N, D)
    y, ssm = _scan(op, u, dt, A, B, C, past["ssm"], tokens)
    y = op.Add(y, op.Mul(u, weights.float32(prefix + "D")))
    y = op.Mul(y, _silu(op, z))
    return weights.linear(op, prefix + "out_proj", y), {"conv": conv, "ssm": ssm}


def _convolve(
    op: OpBuilder, weights: Weights, name: str, x: ir.Value, past: ir.Value, tokens: Tokens
) -> tuple[ir.Value, ir.Value]:
    """The depthwise causal convolution of (L, B, D), and its last inputs (B, K - 1, D).

    K shifted products: as fast as ONNX's `Conv` on a prompt, and four times as fast on a single token.
    """
    d_inner, _, width = weights.shape(name + ".weight")
    inputs = op.Concat(op.Transpose(past, perm=[1, 0, 2]), x, axis=0)  # (K - 1 + L, B, D)
    present = op.Gather(op.Reshape(inputs, [-1, d_inner]), window_rows(op, tokens, width - 1), axis=0)
    y = weights.float32(name + ".bias") if name + ".bias" in weights else None
    for k in range(width):
        end = k - width + 1 or END  # counted from the end: L inputs are left
        shifted = op.Slice(inputs, [k], [end], [0])
        tap = weights.float32(name + ".weight", lambda weight, k=k: weight[:, 0, k], name_as=f"{name}.tap_{k}")
        y = op.Mul(shifted, tap) if y is None else op.Add(y, op.Mul(shifted, tap))
    return y, present


def _scan(
    op: OpBuilder, u: ir.Value, dt: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, past: ir.Value, tokens: Tokens
) -> tuple[ir.Value, ir.Value]:
    """Run the recurrence (Mamba, section 3.2) from `past` on: all h_t C_t, (L, B, D), and the last h, (B, N, D).

    A single token, as in decoding, does without `Scan`, whose start costs as much as the step itself.
    """
    n, d_inner = past.shape[1:]
    per_step = [  # (L, B, ...)
        op.Unsqueeze(dt, [2]),
        op.Unsqueeze(op.Mul(dt, u), [2]),
        op.Unsqueeze(B, [3]),
        op.Unsqueeze(C, [2]),
    ]

    def step(op: OpBuilder, h: ir.Value, dt: ir.Value, dt_u: ir.Value, B: ir.Value, C: ir.Value) -> list[ir.Value]:
        h = op.Add(op.Mul(op.Exp(op.Mul(dt, A)), h), op.Mul(dt_u, B))  # (..., B, N, D)
        return [h, op.MatMul(C, h)]  # (..., B, 1, D)

    def one(op: OpBuilder) -> list[ir.Value]:
        h, y = step(op, past, *per_step)
        return [op.Squeeze(h, [0]), y]

    def many(op: OpBuilder) -> list[ir.Value]:
        shapes = {"h_before": (n, d_inner), "dt": (1, d_inner), "dt_u": (1, d_inner), "B": (n, 1), "C": (1, n)}
        inputs = [_value(name, "batch", *shape) for name, shape in shapes.items()]
        outputs = [_value("h", "batch", n, d_inner), _value("y", "batch", 1, d_inner)]
        body = _subgraph(op, "step", step, inputs, outputs)
        return op.Scan(past, *per_step, body=body, num_scan_inputs=len(per_step), _outputs=2)

    branches = {
        f"{name}_branch": _subgraph(
            op, name, branch, [], [_value("h", "batch", n, d_inner), _value("y", "length", "batch", 1, d_inner)]
        )
        for name, branch in (("then", one), ("else", many))
    }
    ssm, y = op.If(tokens.single, **branches, _outputs=2)
    return op.Squeeze(y, [2]), ssm


def _subgraph(
    op: OpBuilder,
    name: str,
    trace: Callable[..., Sequence[ir.Value]],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> ir.Graph:
    """A graph inside the graph; the names in it start with its own, since no name may come twice."""

    def named(op: OpBuilder, *values: ir.Value) -> Sequence[ir.Value]:
        op.builder.push_module(name)
        return trace(op, *values)

    for value in (*inputs, *outputs):
        value.name = f"{name}.{value.name}"
    return op.builder.subgraph(named, inputs=inputs, outputs=outputs, name=name)


def _value(name: str, *shape: int | str) -> ir.Value:
    return ir.val(name, ir.DataType.FLOAT, shape)


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def _softplus(op: OpBuilder, x: ir.Value) -> ir.Value:
    """log(1 + exp(x)) in operators that onnxruntime has fast kernels for; its Softplus is slow.

    A time step is small, so e = exp(-|x|) is, and 1 + e rounds it. As in Kahan's log1p, log(w) for the rounded
    w = 1 + e is put right by the factor e / (w - 1), which undoes the rounding.
    """
    e = op.Exp(op.Neg(op.Abs(x)))
    w = op.Add(e, 1.0)
    log1p = op.Mul(op.Log(w), op.Div(e, op.Max(op.Sub(w, 1.0), SMALLEST)))
    return op.Add(op.Relu(x), log1p)
