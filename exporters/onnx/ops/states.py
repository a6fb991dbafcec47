"""SSM states of a graph in fewer bits: the same codes and scales as `ssmc.runtime.scan.rounding` makes in torch.

Channels are the last axis of a state here, (B, N, D) or (B, H, N, P); those that share a scale lie side by side, and
scales are (B, ..., channels / share).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.runtime.scan.rounding import DITHER, LEVELS, channel_block

SSM, SCALE = "ssm", "scale"
FLOAT16, INT8 = "float16", "int8"
_MOST = 65504.0  # of float16
Kind: TypeAlias = tuple[tuple[int | str, ...], ir.DataType]
"""Shape, without the batch, and type of a state."""

_TYPES = {"float32": ir.DataType.FLOAT, FLOAT16: ir.DataType.FLOAT16, INT8: ir.DataType.INT8}


def share_of(sizes: Mapping[str, int]) -> int:
    """How many channels of a layer share a scale."""
    return sizes.get("head_dim") or channel_block(sizes["d_inner"])


def kept(shapes: Mapping[str, Sequence[int | str]], sizes: Mapping[str, int], state_dtype: str) -> dict[str, Kind]:
    """Shapes, without the batch, and types of a layer's states as they are kept between calls, scales among them.

    Args:
        shapes: of the states in float32.
        sizes: of the layer.
        state_dtype: of the SSM state, where there is one.
    """
    found: dict[str, Kind] = {name: (tuple(shape), ir.DataType.FLOAT) for name, shape in shapes.items()}
    if SSM in found:
        shape, _ = found[SSM]
        found[SSM] = (shape, _TYPES[state_dtype])
        if state_dtype == INT8:
            found[SCALE] = ((*shape[:-1], int(shape[-1]) // share_of(sizes)), ir.DataType.FLOAT16)
    return found


def unpacked(
    op: OpBuilder, past: Mapping[str, ir.Value], sizes: Mapping[str, int], state_dtype: str
) -> dict[str, ir.Value]:
    """The states in float32, from those that are kept."""
    states = {name: value for name, value in past.items() if name != SCALE}
    if SSM not in past or state_dtype == "float32":
        return states
    shape, codes = past[SSM].shape, op.Cast(past[SSM], to=ir.DataType.FLOAT)
    if state_dtype == INT8:
        scales = op.Cast(op.Unsqueeze(past[SCALE], [-1]), to=ir.DataType.FLOAT)
        codes = op.Reshape(op.Mul(_by_share(op, codes, shape[1:], sizes), scales), [0, *shape[1:]])
    codes.shape, codes.type = shape, ir.TensorType(ir.DataType.FLOAT)
    return states | {SSM: codes}


def packed(
    op: OpBuilder,
    present: Mapping[str, ir.Value],
    shapes: Mapping[str, Sequence[Any]],
    sizes: Mapping[str, int],
    state_dtype: str,
) -> dict[str, ir.Value]:
    """The states as they are kept, from those in float32 of these shapes, without the batch."""
    if SSM not in present or state_dtype == "float32":
        return dict(present)
    state, shape = present[SSM], shapes[SSM]
    if state_dtype == FLOAT16:
        return {**present, SSM: op.Cast(op.Clip(state, -_MOST, _MOST), to=ir.DataType.FLOAT16)}
    whole = _by_share(op, state, shape, sizes)
    largest = op.Mul(op.ReduceMax(op.Abs(whole), [-1], keepdims=1), 1 / LEVELS)
    scales = op.Cast(op.Min(largest, _MOST), to=ir.DataType.FLOAT16)  # (B, ..., channels / share, 1)
    wide = op.Cast(scales, to=ir.DataType.FLOAT)
    x = op.Div(whole, op.Where(op.Greater(wide, 0.0), wide, 1.0))  # where it is 0, all of it is next to nothing
    low = op.Mul(x, DITHER)
    rounded = op.Floor(op.Add(x, op.Sub(low, op.Floor(low))))
    codes = op.Cast(op.Clip(rounded, -LEVELS, LEVELS), to=ir.DataType.INT8)
    return {**present, SSM: op.Reshape(codes, [0, *shape]), SCALE: op.Squeeze(scales, [-1])}


def _by_share(op: OpBuilder, state: ir.Value, shape: Sequence[int], sizes: Mapping[str, int]) -> ir.Value:
    """(B, ..., channels) as (B, ..., channels / share, share); `shape` without the batch."""
    *before, channels = shape
    share = share_of(sizes)
    return op.Reshape(state, [0, *before, channels // share, share])
