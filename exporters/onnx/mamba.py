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

    Between in_proj and the gate there are two ways, for one token of every sequence and for any number of them.

    Args:
        op: of the graph.
        weights: of the model.
        prefix: how the names of the mixer's tensors start.
        hidden: (L, B, d_model), normed.
        past: states by name, as `states` lays them out.
        tokens: which of them are real.
    """
    x, z = op.Split(weights.linear(op, prefix + "in_proj", hidden), axis=-1, num_outputs=2, _outputs=2)  # (L, B, D)
    d_inner, n = weights.shape(prefix + "A_log")
    width = weights.shape(prefix + "conv1d.weight")[2]
    shapes = {"y": ("length", "batch", d_inner), "conv": ("batch", width - 1, d_inner), "ssm": ("batch", n, d_inner)}
    ways = {
        f"{name}_branch": _subgraph(
            op,
            name,
            lambda op, way=way: way(op, weights, prefix, x, past, tokens),
            inputs=[],
            outputs=[_value(output, *shape) for output, shape in shapes.items()],
        )
        for name, way in (("then", _one_token), ("else", _many_tokens))
    }
    y, conv, ssm = op.If(tokens.single, **ways, _outputs=3)
    y = op.Mul(y, _silu(op, z))
    return weights.linear(op, prefix + "out_proj", y), {"conv": conv, "ssm": ssm}


def _one_token(
    op: OpBuilder, weights: Weights, prefix: str, x: ir.Value, past: Mapping[str, ir.Value], tokens: Tokens
) -> list[ir.Value]:
    """Decoding, where every operator costs more to start than to compute: y (1, B, D), conv and ssm."""
    x = op.Transpose(x, perm=[1, 0, 2])  # (B, 1, D)
    window = op.Concat(past["conv"], x, axis=1)  # (B, K, D)
    conv = op.Where(tokens.real, op.Slice(window, [1], [END], [1]), past["conv"])
    u = op.ReduceSum(op.Mul(window, _taps(weights, prefix)), [1], keepdims=1)  # (B, 1, D)
    u = _silu(op, _with_bias(op, weights, prefix, u))
    dt, B, C = _selection(op, weights, prefix, u, op.Softplus)
    dt = op.Where(tokens.real, dt, 0.0)  # a time step of 0: the state stays as it is
    h, y = _step(op, past["ssm"], dt, op.Mul(dt, u), op.Transpose(B, perm=[0, 2, 1]), C, _decay(weights, prefix))
    y = op.Add(y, op.Mul(u, weights.float32(prefix + "D")))
    return [op.Transpose(y, perm=[1, 0, 2]), conv, h]


def _many_tokens(
    op: OpBuilder, weights: Weights, prefix: str, x: ir.Value, past: Mapping[str, ir.Value], tokens: Tokens
) -> list[ir.Value]:
    """A prompt or a piece of one: y (L, B, D), conv and ssm."""
    x, conv = _convolve(op, weights, prefix, x, past["conv"], tokens)
    u = _silu(op, x)
    dt, B, C = _selection(op, weights, prefix, u, lambda x: _softplus(op, x))
    dt = op.Mul(dt, tokens.moving)
    y, ssm = _scan(op, u, dt, B, C, past["ssm"], _decay(weights, prefix))
    return [op.Add(y, op.Mul(u, weights.float32(prefix + "D"))), conv, ssm]


def _convolve(
    op: OpBuilder, weights: Weights, prefix: str, x: ir.Value, past: ir.Value, tokens: Tokens
) -> tuple[ir.Value, ir.Value]:
    """The depthwise causal convolution of (L, B, D), and its last inputs (B, K - 1, D).

    K shifted products take as long as ONNX's `Conv`, and need no transpose.
    """
    taps = _taps(weights, prefix)
    width, d_inner = taps.shape
    inputs = op.Concat(op.Transpose(past, perm=[1, 0, 2]), x, axis=0)  # (K - 1 + L, B, D)
    present = op.Gather(op.Reshape(inputs, [-1, d_inner]), window_rows(op, tokens, width - 1), axis=0)
    y = None
    for k in range(width):
        end = k - width + 1 or END  # counted from the end: L inputs are left
        product = op.Mul(op.Slice(inputs, [k], [end], [0]), op.Slice(taps, [k], [k + 1], [0]))
        y = product if y is None else op.Add(y, product)
    return _with_bias(op, weights, prefix, y), present


def _taps(weights: Weights, prefix: str) -> ir.Value:
    """The convolution's weights, (K, D); the last tap is that of the newest input."""
    return weights.float32(prefix + "conv1d.weight", lambda weight: weight.squeeze(1).t())


def _with_bias(op: OpBuilder, weights: Weights, prefix: str, y: ir.Value) -> ir.Value:
    name = prefix + "conv1d.bias"
    return op.Add(y, weights.float32(name)) if name in weights else y


def _selection(
    op: OpBuilder, weights: Weights, prefix: str, u: ir.Value, softplus: Callable[[ir.Value], ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What depends on the input (..., D): the time step (..., D), B and C (..., N)."""
    n, rank = weights.shape(prefix + "A_log")[1], weights.shape(prefix + "dt_proj.weight")[1]
    parts = weights.linear(op, prefix + "x_proj", u)
    low_rank, B, C = op.Split(parts, [rank, n, n], axis=-1, _outputs=3)
    return softplus(weights.linear(op, prefix + "dt_proj", low_rank)), B, C


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
    body = _subgraph(
        op,
        "step",
        lambda op, *values: _step(op, *values, A),
        inputs=[_value(name, "batch", *shape) for name, shape in shapes.items()],
        outputs=[_value("h", "batch", n, d_inner), _value("y", "batch", 1, d_inner)],
    )
    ssm, y = op.Scan(past, *per_step, body=body, num_scan_inputs=len(per_step), _outputs=2)
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
