"""What the layers of both generations of Mamba are made of in an ONNX graph: convolution, activations, branches.

Time comes first, (L, B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.exporters.onnx.ops.padding import Tokens, window_rows
from ssmc.exporters.onnx.ops.weights import Weights

END = 2**63 - 1  # of a slice that goes to the end
SMALLEST = 1e-30  # for w - 1 where e is below the resolution of 1 + e: log(w) is 0 there, and so is the time step


@dataclass(frozen=True)
class Layer:
    """What the mixer of a layer is written from.

    Attributes:
        weights: of the model.
        prefix: how the names of the mixer's tensors start.
        past: its states before the tokens by name, laid out as `states` of its module says.
        tokens: which of them are real.
        config: transformers' configuration.
        target: of the module's `TARGETS`.
    """

    weights: Weights
    prefix: str
    past: Mapping[str, ir.Value]
    tokens: Tokens
    config: Any
    target: str


def convolve(
    op: OpBuilder,
    weights: Weights,
    prefix: str,
    x: ir.Value,
    past: ir.Value,
    tokens: Tokens,
    tail: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """The depthwise causal convolution of (L, B, D), and its last inputs (B, K - 1, D).

    K shifted products take as long as ONNX's `Conv`, and need no transpose.

    Args:
        op: of the graph.
        weights: of the model.
        prefix: how the names of the mixer's tensors start.
        x: (L, B, D).
        past: (B, K - 1, D) inputs before x.
        tokens: which of them are real.
        tail: (P, B, D) more inputs at the end, which are no tokens: then (L + P, B, D) come out.
    """
    taps = conv_taps(weights, prefix)
    width, d_inner = taps.shape
    behind = [] if tail is None else [tail]
    inputs = op.Concat(op.Transpose(past, perm=[1, 0, 2]), x, *behind, axis=0)  # (K - 1 + L, B, D)
    present = op.Gather(op.Reshape(inputs, [-1, d_inner]), window_rows(op, tokens, width - 1), axis=0)
    y = None
    for k in range(width):
        end = k - width + 1 or END  # counted from the end: L inputs are left
        product = op.Mul(op.Slice(inputs, [k], [end], [0]), op.Slice(taps, [k], [k + 1], [0]))
        y = product if y is None else op.Add(y, product)
    return with_bias(op, weights, prefix, y), present


def convolve_one(
    op: OpBuilder, weights: Weights, prefix: str, x: ir.Value, past: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The same of one real token (1, B, D), in few operators: (B, 1, D), and the last inputs (B, K - 1, D)."""
    window = op.Concat(past, op.Transpose(x, perm=[1, 0, 2]), axis=1)  # (B, K, D)
    present = op.Slice(window, [1], [END], [1])
    y = op.ReduceSum(op.Mul(window, conv_taps(weights, prefix)), [1], keepdims=1)
    return with_bias(op, weights, prefix, y), present


def conv_taps(weights: Weights, prefix: str) -> ir.Value:
    """The convolution's weights, (K, D); the last tap is that of the newest input."""
    return weights.float32(prefix + "conv1d.weight", lambda weight: weight.squeeze(1).t())


def with_bias(op: OpBuilder, weights: Weights, prefix: str, y: ir.Value) -> ir.Value:
    """What the convolution adds to its sums, where it has a bias."""
    name = prefix + "conv1d.bias"
    return op.Add(y, weights.float32(name)) if name in weights else y


def one_or_many(
    op: OpBuilder,
    tokens: Tokens,
    one: Callable[[OpBuilder], Sequence[ir.Value]],
    many: Callable[[OpBuilder], Sequence[ir.Value]],
    outputs: Mapping[str, Sequence[int | str]],
) -> Sequence[ir.Value]:
    """Two ways to the same values: for one real token of every sequence, and for any tokens.

    Args:
        op: of the graph.
        tokens: of the batch.
        one: makes the values when there is one real token everywhere.
        many: makes them otherwise.
        outputs: their names and shapes.
    """
    ways = {
        f"{name}_branch": subgraph(
            op, name, way, inputs=[], outputs=[typed(output, *shape) for output, shape in outputs.items()]
        )
        for name, way in (("then", one), ("else", many))
    }
    return op.If(tokens.single, **ways, _outputs=len(outputs))


def subgraph(
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


def typed(name: str, *shape: int | str) -> ir.Value:
    """A float32 value of a subgraph, before it has a name of its own."""
    return ir.val(name, ir.DataType.FLOAT, shape)


def silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x)), which onnxruntime sees as one operator."""
    return op.Mul(x, op.Sigmoid(x))


def softplus(op: OpBuilder, x: ir.Value) -> ir.Value:
    """log(1 + exp(x)) in operators that onnxruntime has fast kernels for; its Softplus is slow.

    A time step is small, so e = exp(-|x|) is, and 1 + e rounds it. As in Kahan's log1p, log(w) for the rounded
    w = 1 + e is put right by the factor e / (w - 1), which undoes the rounding.
    """
    e = op.Exp(op.Neg(op.Abs(x)))
    w = op.Add(e, 1.0)
    log1p = op.Mul(op.Log(w), op.Div(e, op.Max(op.Sub(w, 1.0), SMALLEST)))
    return op.Add(op.Relu(x), log1p)
