"""Mixtures of experts in an ONNX graph, in standard operators: few tokens fetch the experts they chose, many ask all.

A prompt reads every expert anyway, and one product for all of them is what onnxruntime does fastest; a step of decoding
must not read those that nobody chose.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.exporters.onnx.ops.parts import subgraph, typed
from ssmc.exporters.onnx.ops.weights import Weights

Activation = Callable[[OpBuilder, ir.Value, int], ir.Value]
"""What stands between both maps, given their axis of neurons: (..., I, ...) from (..., 2 I, ...) or (..., I, ...)."""


def mixture(
    op: OpBuilder,
    weights: Weights,
    names: tuple[str, str],
    x: ir.Value,
    chosen: ir.Value,
    shares: ir.Value,
    activation: Activation,
) -> ir.Value:
    """The sum of what the chosen experts make of every token, (T, d).

    Args:
        op: of the graph.
        weights: of the model.
        names: of the maps of all experts, (E, 2 I or I, d) and (E, d, I).
        x: (T, d).
        chosen: (T, k) int64.
        shares: (T, k) of each chosen one.
        activation: between both maps.
    """
    number, _, width = weights.shape(names[0])
    up, down = (weights.float32(name) for name in names)
    tokens = op.Shape(x, start=0, end=1)
    taken = op.Mul(tokens, op.Shape(chosen, start=1, end=2))
    output = [typed("mixed", "tokens", width)]
    few = subgraph(op, "few", lambda op: [_few(op, up, down, x, chosen, shares, activation)], [], output)
    output = [typed("mixed", "tokens", width)]
    many = subgraph(op, "many", lambda op: [_many(op, up, down, x, chosen, shares, activation, number)], [], output)
    return op.If(op.LessOrEqual(op.Squeeze(taken, [0]), number), then_branch=few, else_branch=many, _outputs=1)


def _few(
    op: OpBuilder,
    up: ir.Value,
    down: ir.Value,
    x: ir.Value,
    chosen: ir.Value,
    shares: ir.Value,
    activation: Activation,
) -> ir.Value:
    """The matrices of the chosen experts, one product for each token and choice."""
    column = op.Unsqueeze(x, [1, 3])  # (T, 1, d, 1)
    inner = activation(op, op.MatMul(op.Gather(up, chosen, axis=0), column), 2)  # (T, k, I, 1)
    outer = op.Squeeze(op.MatMul(op.Gather(down, chosen, axis=0), inner), [3])  # (T, k, d)
    return op.ReduceSum(op.Mul(outer, op.Unsqueeze(shares, [2])), [1], keepdims=0)


def _many(
    op: OpBuilder,
    up: ir.Value,
    down: ir.Value,
    x: ir.Value,
    chosen: ir.Value,
    shares: ir.Value,
    activation: Activation,
    number: int,
) -> ir.Value:
    """All experts on all tokens; those that were not chosen count for nothing."""
    inner = activation(op, op.MatMul(up, op.Transpose(x, perm=[1, 0])), 1)  # (E, I, T)
    shape = op.Concat(op.Shape(x, start=0, end=1), [number], axis=0)
    each = op.ScatterElements(op.Expand(0.0, shape), chosen, shares, axis=1)  # (T, E)
    inner = op.Mul(inner, op.Unsqueeze(op.Transpose(each, perm=[1, 0]), [1]))
    return op.Transpose(op.ReduceSum(op.MatMul(down, inner), [0], keepdims=0), perm=[1, 0])
