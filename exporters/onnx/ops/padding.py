"""Which token is where: rows of a batch that hold padding, in the middle of a graph whose states must not see it.

Every row's real tokens are moved to its front, in their order, and its padding to its end. Convolution and scan are
causal, so nothing behind the last real token can reach a real one, wherever the padding was; what remains is to stop
the state from moving there (a time step of 0) and to take the last inputs of the convolution and the last token's
logits where the row's real tokens end.

Tensors inside the graph have time first, (L, B, ...): a step of the scan is then a contiguous piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.runtime.models.generation.onnx_logits import BATCH, CHOSEN_ROWS, PLACE, ROW


@dataclass(frozen=True)
class Tokens:
    """A batch whose real tokens stand in front.

    Attributes:
        ids: (L, B) int64, real ones first.
        place: (L, B) int64, where the token that was given at (t, b) stands now.
        count: (B,) int64, real tokens of each row.
        moving: (L, B, 1) float32, 1 where there is a real token, 0 behind them.
        batch: B, int64, one element.
        single: whether this is one token of every sequence, all of them real, bool.
        row: (B,) int64, 0 to B - 1.
        kept_as_given: whether caches keep tokens in the order they were given in, padding among them; otherwise the
            real ones of every call first.
    """

    ids: ir.Value
    place: ir.Value
    count: ir.Value
    moving: ir.Value
    batch: ir.Value
    single: ir.Value
    row: ir.Value
    kept_as_given: bool = False


def real_first(op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> Tokens:
    """Move every row's real tokens to its front.

    Args:
        op: of the graph.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for a real token and 0 for padding, in any order.
    """
    given = op.Transpose(input_ids, perm=[1, 0])  # (L, B)
    real = op.Transpose(attention_mask, perm=[1, 0])
    count = op.ReduceSum(attention_mask, [1], keepdims=0)  # (B,)
    among_real = op.Sub(op.CumSum(real, 0), 1)  # how many real tokens came before
    among_padding = op.Sub(op.CumSum(op.Sub(1, real), 0), 1)
    is_real = op.Cast(real, to=ir.DataType.BOOL)
    place = op.Where(is_real, among_real, op.Add(count, among_padding))
    length, batch = op.Shape(input_ids, start=1, end=2), op.Shape(input_ids, start=0, end=1)
    position = op.Unsqueeze(op.Range(0, op.Squeeze(length, [0]), 1), [1])  # (L, 1)
    moving = op.Cast(op.Less(position, op.Unsqueeze(count, [0])), to=ir.DataType.FLOAT)
    row = op.Range(0, op.Squeeze(batch, [0]), 1)
    place.name, batch.name, row.name = PLACE, BATCH, ROW
    return Tokens(
        ids=op.ScatterElements(given, place, given, axis=0),
        place=place,
        count=count,
        moving=op.Unsqueeze(moving, [2]),
        batch=batch,
        single=op.And(op.Equal(op.Squeeze(length, [0]), 1), op.Equal(op.ReduceMin(attention_mask, keepdims=0), 1)),
        row=row,
    )


def window_rows(op: OpBuilder, tokens: Tokens, width: int) -> ir.Value:
    """Where the last `width` inputs of the convolution stand, (B, width): rows of (width + L, B, D) seen as a matrix.

    The first `width` of them are those of the state before, so a row of few tokens keeps some of these.
    """
    times = op.Add(op.Unsqueeze(tokens.count, [1]), op.Range(0, width, 1))  # (B, width)
    return op.Add(op.Mul(times, tokens.batch), op.Unsqueeze(tokens.row, [1]))


def chosen_rows(op: OpBuilder, tokens: Tokens, logits: str) -> ir.Value:
    """Which rows of (L, B, d) seen as (L B, d) the head reads: (B, 1) or (B, L).

    Args:
        op: of the graph.
        tokens: of the batch.
        logits: "last": each row's last real token (of a row of padding only, token 0); "all": all, as they were given.
    """
    if logits == "last":
        last = op.Max(op.Sub(tokens.count, 1), 0)
        rows = op.Unsqueeze(op.Add(op.Mul(last, tokens.batch), tokens.row), [1])
    else:
        rows = op.Transpose(op.Add(op.Mul(tokens.place, tokens.batch), tokens.row), perm=[1, 0])
    rows.name = CHOSEN_ROWS
    return rows
