"""The weights of a model as initializers of a graph: named as in the checkpoint, laid out as ONNX reads them.

Nothing is copied while the graph is built. An initializer knows how to make its numbers and does so when it is
written, one after the other, so that a model needs no second copy of itself in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, OpBuilder

from ssmc.exporters.onnx.ops.codes import Codes

TORCH = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Weights:
    """Gives a graph the tensors of a model, and the products with them."""

    def __init__(
        self, builder: GraphBuilder, tensors: Mapping[str, torch.Tensor], dtype: ir.DataType, codes: Codes | None = None
    ):
        """Begin.

        Args:
            builder: of the graph that gets the initializers.
            tensors: by transformers' names.
            dtype: of matrices; float32 is read and given by all products whatever it is.
            codes: matrices that are to be written as codes; None: none of them.
        """
        self._builder, self._tensors, self._dtype = builder, tensors, dtype
        self._codes = Codes(builder, {}) if codes is None else codes
        self._made: dict[str, ir.Value] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the checkpoint."""
        return tuple(self._tensors[name].shape)

    def float32(
        self, name: str, change: Callable[[torch.Tensor], torch.Tensor] = _unchanged, name_as: str | None = None
    ) -> ir.Value:
        """A tensor in float32, changed on the way where it must be."""
        return self._initializer(name_as or name, name, change, ir.DataType.FLOAT)

    def rows(self, op: OpBuilder, name: str, ids: ir.Value) -> ir.Value:
        """Rows of a matrix (V, d) by their numbers (L, B): (L, B, d) float32."""
        if name in self._codes:
            return self._codes.rows(op, name, ids)
        table = self._initializer(name, name, _unchanged, self._dtype)
        return self._to_float32(op, op.Gather(table, ids, axis=0))

    def linear(self, op: OpBuilder, name: str, x: ir.Value) -> ir.Value:
        """A linear layer applied to (..., in): (..., out) float32."""
        return self.linears(op, name, x, {"": self.shape(name + ".weight")[0]})[0]

    def linears(self, op: OpBuilder, name: str, x: ir.Value, parts: Mapping[str, int]) -> list[ir.Value]:
        """The outputs of a linear layer in parts, each a product of its own: none has to be copied out of the whole.

        Args:
            op: of the graph.
            name: of the layer.
            x: (..., in).
            parts: name and size of each, in the order of the outputs; together they are all.
        """
        weight, bias, start, outputs = name + ".weight", name + ".bias", 0, []
        x = self._from_float32(op, x)
        for part, size in parts.items():
            rows, end = slice(start, start + size), f".{part}" if part else ""
            if weight in self._codes:
                y = self._codes.product(op, weight, x, rows, end)
            else:
                matrix = self._initializer(weight + end, weight, _rows_transposed(rows), self._dtype)
                y = self._to_float32(op, op.MatMul(x, matrix))
            if bias in self:
                y = op.Add(y, self.float32(bias, itemgetter(rows), name_as=bias + end))
            outputs.append(y)
            start += size
        return outputs

    def head(self, op: OpBuilder, name: str, x: ir.Value, shared: bool) -> ir.Value:
        """Products (B, T, V) of (B, T, d) with all rows of a matrix (V, d), float32.

        Args:
            op: of the graph.
            name: of the matrix.
            x: (B, T, d).
            shared: read the initializer that `rows` reads, so that a tied matrix is stored once.
        """
        if name in self._codes:
            return self._codes.product(op, name, x)
        x = self._from_float32(op, x)
        if not shared:
            matrix = self._initializer(f"{name}.t", name, torch.t, self._dtype)
            return self._to_float32(op, op.MatMul(x, matrix))
        vocab_size, d_model = self.shape(name)
        matrix = self._initializer(name, name, _unchanged, self._dtype)
        flat = op.Gemm(op.Reshape(x, [-1, d_model]), matrix, transB=1)  # reads (V, d) as it lies
        shape = op.Concat(op.Shape(x, start=0, end=2), [vocab_size], axis=0)
        return self._to_float32(op, op.Reshape(flat, shape))

    def _initializer(
        self, name: str, source: str, change: Callable[[torch.Tensor], torch.Tensor], dtype: ir.DataType
    ) -> ir.Value:
        """An initializer called `name`, made once."""
        if name not in self._made:
            tensor = self._tensors[source]

            def evaluate() -> ir.TensorProtocol:
                return ir.tensor(change(tensor.to(TORCH[dtype])).contiguous().numpy(), name=name)

            shape = ir.Shape(change(tensor.to("meta")).shape)
            lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
            self._made[name] = self._builder.initializer(lazy, name=name, qualify=False)
        return self._made[name]

    def _from_float32(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return x if self._dtype == ir.DataType.FLOAT else op.Cast(x, to=self._dtype)

    def _to_float32(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return x if self._dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)


def _rows_transposed(rows: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    """Take these rows and turn them into columns."""
    return lambda weight: weight[rows].t()
