"""Products with weights in few bits, by onnxruntime's own MatMulNBits: the codes and scales of the compressed model.

MatMulNBits computes x W' from W (out, in) as it lies: codes without a sign, two to a byte where they have 4 bits, a
scale and perhaps a zero point for each group of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, OpBuilder

from ssmc.runtime.quantized import Quantized

MICROSOFT = "com.microsoft"  # domain of onnxruntime's own operators
FLOAT32, INT8 = 1, 4  # accuracy levels: what the inputs of a product are computed in


class Codes:
    """Gives a graph the weights that are codes."""

    def __init__(self, builder: GraphBuilder, codes: Mapping[str, Quantized], level: int = FLOAT32):
        """Begin.

        Args:
            builder: of the graph that gets the initializers.
            codes: by the names of the weights.
            level: FLOAT32, or INT8 for inputs that are rounded group by group.
        """
        self._builder, self._codes, self._level = builder, codes, level
        self._made: dict[str, ir.Value] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._codes

    def product(self, op: OpBuilder, name: str, x: ir.Value, rows: slice = slice(None), end: str = "") -> ir.Value:
        """x (..., in) times rows of a weight (out, in): (..., out) float32.

        Args:
            op: of the graph.
            name: of the weight.
            x: float32.
            rows: which outputs.
            end: what sets the names of these outputs' numbers apart.
        """
        code = self._codes[name]
        inputs = [x, *self._numbers(name, rows, end)]
        count = len(range(code.codes.shape[0])[rows])
        return op.MatMulNBits(
            *inputs,
            K=code.codes.shape[1],
            N=count,
            bits=code.shape.bits,
            block_size=code.shape.group,
            accuracy_level=self._level,
            _domain=MICROSOFT,
            _version=1,
        )

    def rows(self, op: OpBuilder, name: str, ids: ir.Value) -> ir.Value:
        """Rows of a weight (V, d) by their numbers (L, B): (L, B, d) float32, from what `product` reads."""
        code = self._codes[name]
        groups, size = code.scale.shape[1], code.shape.group
        packed, scale, *zeros = self._numbers(name, slice(None), "")
        bytes_ = op.Gather(packed, ids, axis=0)  # (L, B, groups, bytes)
        numbers = _unpacked(op, bytes_, [0, 0, groups, size]) if code.shape.bits == 4 else bytes_
        zero: ir.Value | float = float(2 ** (code.shape.bits - 1))
        if zeros:
            zero = op.Gather(zeros[0], ids, axis=0)  # (L, B, bytes)
            if code.shape.bits == 4:
                zero = op.Slice(_unpacked(op, zero, [0, 0, 2 * zeros[0].shape[1]]), [0], [groups], [-1])
            zero = op.Unsqueeze(op.Cast(zero, to=ir.DataType.FLOAT), [-1])
        centred = op.Sub(op.Cast(numbers, to=ir.DataType.FLOAT), zero)
        values = op.Mul(centred, op.Unsqueeze(op.Gather(scale, ids, axis=0), [-1]))
        return op.Reshape(values, [0, 0, groups * size])

    def _numbers(self, name: str, rows: slice, end: str) -> list[ir.Value]:
        """Codes (out, groups, bytes), scales (out, groups) and, where there are any, zero points (out, bytes)."""
        code = self._codes[name]
        groups, half = code.scale.shape[1], 2 ** (code.shape.bits - 1) if code.shape.symmetric else 0
        count = len(range(code.codes.shape[0])[rows])
        size, per_byte = code.shape.group, 8 // code.shape.bits

        def codes() -> torch.Tensor:
            unsigned = (code.codes[rows].short() + half).to(torch.uint8)
            return _packed(unsigned, code.shape.bits).view(count, groups, -1)

        found = [
            self._initializer(f"{name}{end}.codes", codes, ir.DataType.UINT8, [count, groups, size // per_byte]),
            self._initializer(f"{name}{end}.scale", lambda: code.scale[rows], ir.DataType.FLOAT, [count, groups]),
        ]
        if code.zero is not None:
            zero, width = code.zero, -(-groups // per_byte)

            def zeros() -> torch.Tensor:
                padded = torch.nn.functional.pad(zero[rows], (0, width * per_byte - groups))
                return _packed(padded, code.shape.bits)

            found.append(self._initializer(f"{name}{end}.zero", zeros, ir.DataType.UINT8, [count, width]))
        return found

    def _initializer(
        self, name: str, make: Callable[[], torch.Tensor], dtype: ir.DataType, shape: list[int]
    ) -> ir.Value:
        """An initializer, made once; its numbers when it is written."""
        if name not in self._made:

            def evaluate() -> ir.TensorProtocol:
                return ir.tensor(make().contiguous().numpy(), name=name)

            lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)
            self._made[name] = self._builder.initializer(lazy, name=name, qualify=False)
        return self._made[name]


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (out, n) without a sign, as bytes: of two codes of 4 bits the first is the low half."""
    return codes if bits == 8 else codes[:, ::2] | (codes[:, 1::2] << 4)


def _unpacked(op: OpBuilder, packed: ir.Value, shape: list[int]) -> ir.Value:
    """The opposite of `_packed` for 4 bits, in this shape."""
    low = op.BitwiseAnd(packed, _byte(op, 15))
    high = op.BitShift(packed, _byte(op, 4), direction="RIGHT")
    return op.Reshape(op.Concat(op.Unsqueeze(low, [-1]), op.Unsqueeze(high, [-1]), axis=-1), shape)


def _byte(op: OpBuilder, number: int) -> ir.Value:
    return op.Constant(value=ir.tensor(torch.tensor(number, dtype=torch.uint8).numpy()))
