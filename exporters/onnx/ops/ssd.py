"""Mamba-2's scan in an ONNX graph: a prompt in chunks of matrix products; one token by itself, or by LinearAttention.

Within a chunk the recurrence is written out as a lower triangular matrix over token pairs, C_t B_s' exp(sum of dt A
from s + 1 to t); between chunks only the state travels (Mamba-2, section 6: state space duality).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from ssmc.exporters.onnx.ops.codes import MICROSOFT
from ssmc.exporters.onnx.ops.parts import END, subgraph, typed

CHUNK = 64  # tokens: the (T, T) matrices of all heads stay in a core's cache; 32 and 128 were slower
FORGOTTEN = -60.0
"""The exponent at which nothing is left of a state: 1e-26, far below what float32 adds to anything. Where numbers come
near float32's smallest ones, exp and products are many times slower (a prefill took 1.2 times as long)."""


@dataclass(frozen=True)
class Heads:
    """Sizes of a layer: H heads of P channels in G groups that share B and C, N states."""

    heads: int
    head_dim: int
    d_state: int
    groups: int

    @property
    def d_inner(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def split(self) -> list[int]:
        """The convolution's channels: x, B and C."""
        return [self.d_inner, self.groups * self.d_state, self.groups * self.d_state]

    @property
    def group_of(self) -> list[int]:
        """The group of each head."""
        return [head // (self.heads // self.groups) for head in range(self.heads)]


@dataclass(frozen=True)
class Inputs:
    """What a scan reads; what comes before the last axis, each scan says."""

    u: ir.Value  # (..., D)
    dt: ir.Value  # (..., H), 0 where the state stays
    B: ir.Value  # (..., G N)
    C: ir.Value  # (..., G N)
    A: ir.Value  # (H,)
    D: ir.Value  # (H, 1, 1)


@dataclass(frozen=True)
class Chunks:
    """How L tokens are divided, and filled up, all int64 of one element."""

    number: ir.Value
    length: ir.Value  # T
    missing: ir.Value  # number T - L
    tokens: ir.Value  # L

    def zeros(self, op: OpBuilder, batch: ir.Value, width: int) -> ir.Value:
        """What fills the last chunk up, (missing, B, width)."""
        return op.Expand(0.0, op.Concat(self.missing, batch, [width], axis=0))

    def divided(self, op: OpBuilder, x: ir.Value, *inner: int) -> ir.Value:
        """(number T, B, ...) as (number, T, B, *inner)."""
        return op.Reshape(x, op.Concat(self.number, self.length, [-1, *inner], axis=0))


def chunks_of(op: OpBuilder, x: ir.Value) -> Chunks:
    """Divide (L, B, ...) into equal chunks of CHUNK tokens at most, so that few are missing in the last one."""
    tokens = op.Shape(x, start=0, end=1)
    number = op.Max(op.Div(op.Add(tokens, [CHUNK - 1]), [CHUNK]), [1])  # no tokens must not divide by 0
    length = op.Div(op.Add(tokens, op.Sub(number, [1])), number)
    return Chunks(number, length, op.Sub(op.Mul(number, length), tokens), tokens)


def chunked(op: OpBuilder, heads: Heads, chunks: Chunks, inputs: Inputs, past: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The scan of any number of tokens in standard operators, chunk after chunk.

    Args:
        op: of the graph.
        heads: sizes.
        chunks: of the tokens.
        inputs: time first and filled up, (number T, B, ...).
        past: (B, H, N, P).

    Returns:
        y (L, B, D) with the skip D, and the state after the last token.
    """
    H, P, N, G = heads.heads, heads.head_dim, heads.d_state, heads.groups
    per_chunk = [
        op.Transpose(chunks.divided(op, inputs.u, H, P), perm=[0, 2, 3, 1, 4]),  # (number, B, H, T, P)
        op.Transpose(chunks.divided(op, inputs.dt, H, 1), perm=[0, 2, 3, 1, 4]),  # (number, B, H, T, 1)
        op.Transpose(chunks.divided(op, inputs.B, G, N), perm=[0, 2, 3, 4, 1]),  # (number, B, G, N, T)
        op.Transpose(chunks.divided(op, inputs.C, G, N), perm=[0, 2, 3, 1, 4]),  # (number, B, G, T, N)
    ]
    shapes: dict[str, tuple[int | str, ...]] = {"h_before": (H, N, P), "u": (H, "tokens", P), "dt": (H, "tokens", 1)}
    shapes |= {"B": (G, N, "tokens"), "C": (G, "tokens", N)}
    body = subgraph(
        op,
        "chunk",
        lambda op, h, u, dt, B, C: _chunk(op, heads, h, u, dt, B, C, inputs),
        inputs=[typed(name, "batch", *shape) for name, shape in shapes.items()],
        outputs=[typed("h", "batch", H, N, P), typed("y", "batch", H, "tokens", P)],
    )
    h, y = op.Scan(past, *per_chunk, body=body, num_scan_inputs=len(per_chunk), _outputs=2)
    y = op.Transpose(y, perm=[0, 3, 1, 2, 4])  # (number, T, B, H, P)
    y = op.Reshape(y, op.Concat(op.Mul(chunks.number, chunks.length), [-1, heads.d_inner], axis=0))
    return op.Slice(y, [0], chunks.tokens, [0]), h


def _chunk(
    op: OpBuilder,
    heads: Heads,
    h: ir.Value,
    u: ir.Value,
    dt: ir.Value,
    B: ir.Value,
    C: ir.Value,
    inputs: Inputs,
) -> list[ir.Value]:
    """One chunk: the state after it, (B, H, N, P), and y (B, H, T, P); all else is shaped as in `chunked`."""
    drive = op.Mul(u, dt)
    # in float64, because the difference of two long sums is what counts
    exponents = op.Cast(op.Mul(dt, op.Unsqueeze(inputs.A, [1, 2])), to=ir.DataType.DOUBLE)
    sums = op.CumSum(exponents, -2)  # (B, H, T, 1)
    between = _float32(op, op.Sub(sums, op.Transpose(sums, perm=[0, 1, 3, 2])))  # (B, H, t, s)
    pairs = _per_head(op, heads, op.Trilu(op.MatMul(C, B), upper=0))  # tokens s that are not after t
    pairs = op.Mul(pairs, op.Exp(op.Clip(between, FORGOTTEN, 0.0)))
    total = op.Slice(sums, [-1], [END], [-2])
    since_start, to_end, whole = (_remains(op, exponent) for exponent in (sums, op.Sub(total, sums), total))
    carried = op.Mul(op.MatMul(_per_head(op, heads, C), h), since_start)
    y = op.Add(op.Add(op.MatMul(pairs, drive), carried), op.Mul(u, inputs.D))
    left = op.MatMul(_per_head(op, heads, B), op.Mul(drive, to_end))
    return [op.Add(op.Mul(h, whole), left), y]


def _remains(op: OpBuilder, exponent: ir.Value) -> ir.Value:
    """exp of float64 exponents as float32, 0 below FORGOTTEN."""
    exponent = _float32(op, exponent)
    return op.Where(op.Less(exponent, FORGOTTEN), 0.0, op.Exp(exponent))


def _float32(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Cast(x, to=ir.DataType.FLOAT)


def step(op: OpBuilder, heads: Heads, inputs: Inputs, past: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One token of every sequence: y (B, 1, D) with the skip D, and the state after it.

    Args:
        op: of the graph.
        heads: sizes.
        inputs: (B, 1, ...).
        past: (B, H, N, P).
    """
    H, P, N, G = heads.heads, heads.head_dim, heads.d_state, heads.groups
    u = op.Reshape(inputs.u, [0, H, 1, P])
    B = _per_head(op, heads, op.Reshape(inputs.B, [0, G, N, 1]))
    C = _per_head(op, heads, op.Reshape(inputs.C, [0, G, 1, N]))
    decay = op.Reshape(op.Exp(op.Mul(inputs.dt, inputs.A)), [0, H, 1, 1])
    drive = op.Mul(u, op.Reshape(inputs.dt, [0, H, 1, 1]))
    h = op.Add(op.Mul(past, decay), op.Mul(B, drive))
    y = op.Add(op.MatMul(C, h), op.Mul(u, inputs.D))
    return op.Reshape(y, [0, 1, heads.d_inner]), h


def linear_attention(op: OpBuilder, heads: Heads, inputs: Inputs, past: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The same in onnxruntime's LinearAttention: query C, key B, value dt u, decay dt A. Arguments as for `step`.

    The operator takes any number of tokens, but walks over them one by one, and chunks are as fast. Here are fewer
    query and key heads (the groups) than value heads, as in Qwen's linear attention; ONNX's own operator of this name
    (opset 27) does not allow that.
    """
    H, P = heads.heads, heads.head_dim
    u = op.Reshape(inputs.u, [0, 0, H, P])
    drive = op.Reshape(op.Mul(u, op.Unsqueeze(inputs.dt, [3])), [0, 0, H * P])
    y, h = op.LinearAttention(
        inputs.C,
        inputs.B,
        drive,
        past,
        op.Mul(inputs.dt, inputs.A),
        update_rule="gated",
        scale=1.0,  # else 1 / sqrt(N)
        q_num_heads=heads.groups,
        kv_num_heads=H,
        _domain=MICROSOFT,
        _version=1,
        _outputs=2,
    )
    skip = op.Reshape(op.Mul(u, op.Squeeze(inputs.D, [2])), [0, 0, H * P])
    return op.Add(y, skip), h


def _per_head(op: OpBuilder, heads: Heads, x: ir.Value) -> ir.Value:
    """What a group's heads share, (..., G, x, y), for each of them, (..., H, x, y); one group's needs no copies."""
    return x if heads.groups == 1 else op.Gather(x, heads.group_of, axis=-3)
