"""Gradients of the selective scan on a GPU, as a torch.autograd.Function.

Nothing but what the scan reads is kept for the backward pass. It goes over stretches of tokens from the last to the
first, so that what it needs in between is bounded; most sequences are one stretch. A stretch is cut into chunks: one
pass finds the state each chunk starts from, a second one, backwards in time, the gradient of the state each chunk ends
with, and `chunk_gradients_kernel` then steps back through every chunk, a few tokens at a time. The states of these lie
in registers; that before them is computed anew from the start of the chunk, which costs less than to keep it.

With h_t = a_t h_{t-1} + w_t B_t, a_t = exp(dt_t A), w_t = dt_t u_t, o_t = h_t C_t + D u_t and y_t = o_t silu(z_t), and
g_t standing for the gradient of h_t, the chain rule gives per token

    g_t = dy_t silu(z_t) C_t + a_{t+1} g_{t+1}        dC_t = sum_d dy_t silu(z_t) h_t     dB_t = sum_d g_t w_t
    d(dt_t A) = g_t a_t h_{t-1}                       dw_t = sum_n g_t B_t                dz_t = dy_t o_t silu'(z_t)

Sums over channels and over time are added up in a fixed order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ssmc.runtime.scan.gpu.chunks import (
    CARRIED,
    Chunked,
    Chunks,
    carried_together,
    last_of,
    load_rates,
    load_readers,
    load_rows,
    load_states,
    store_states,
)
from ssmc.runtime.scan.gpu.kernels import LOG2_E, advance, read_out, time_step, zero_tiles
from ssmc.runtime.scan.gpu.lanes import chain
from ssmc.runtime.scan.gpu.plans import run
from ssmc.runtime.scan.inputs import ScanInputs

LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = 32  # channels of a program
CHUNK = 32  # tokens of a program, of which it recomputes (1 + 2 + ... ) / n times as many as it has
# What is held in between, as shares of u's bytes; y, the gradients of three sequences and all this are together no more
# than twice the forward's memory. Little tensors get more, so that one stretch fills the GPU.
STATES_SHARE, STATES_BYTES = 0.15, 8 << 20  # of the states that chunks of a stretch start from; those around them again
READERS_SHARE, READERS_BYTES = 0.3, 3 << 20  # of what blocks of channels add to the gradients of B and C


@triton.jit
def opened(z):
    """1 / (1 + e^-z)."""
    return 1 / (1 + tl.exp2(-z * LOG2_E))


@triton.jit
def back_through(r, rates, step, drive, g, C, PARTS: tl.constexpr):
    """The gradient of the state before a token, from that of the state after it which comes from later tokens."""
    before = ()
    for i in tl.static_range(len(PARTS)):
        through = r[i] + g[None, :] * C[i].to(tl.float32)[:, None]
        before = before + (through * tl.exp2(step[None, :] * rates[i]),)
    return before


@triton.jit(do_not_specialize=["length", "chunk", "chunks", "zero"])
def chunk_tails_kernel(
    dt_ptr,
    dt_batch,
    dt_token,
    z_ptr,
    z_batch,
    z_token,
    C_ptr,
    C_batch,
    C_token,
    dy_ptr,
    dy_batch,
    dy_token,
    A_ptr,
    bias_ptr,
    ends_ptr,
    sums_ptr,
    length,
    chunk,
    chunks,
    channels,
    states,
    zero,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    C_ALIGNED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
):
    """What a chunk of tokens makes of no gradient from later tokens, and the sum of its time steps.

    Grid (blocks of channels, chunks, sequences). Written to `ends` (B, chunks + 1, N, D), at the chunk's own place,
    and `sums` (B, chunks, D).
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    across = d + zero  # the same, but Triton does not know of neighbours, so that a lane keeps one channel
    part, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = d < channels
    size = channels * states
    first = part.to(tl.int64) * chunk
    count = tl.minimum(length - part * chunk, chunk)
    dt_ptr += row * dt_batch + first * dt_token
    z_ptr += row * z_batch + first * z_token
    C_ptr += row * C_batch + first * C_token
    dy_ptr += row * dy_batch + first * dy_token
    rates = load_rates(A_ptr, ends_ptr, across, here, length < 0, channels, states, PARTS)
    bias = tl.load(bias_ptr + d, mask=here, other=0.0) if SOFTPLUS else 0.0
    r = zero_tiles(PARTS, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, chunk, TOKENS):
        at = (chunk - TOKENS - done).to(tl.int64)
        left = count - (chunk - TOKENS - done)  # none of the tokens is there, if not positive
        dts = load_rows(dt_ptr + at * dt_token, dt_token, left, d, channels, TOKENS)
        dys = load_rows(dy_ptr + at * dy_token, dy_token, left, d, channels, TOKENS)
        if GATED:
            zs = load_rows(z_ptr + at * z_token, z_token, left, d, channels, TOKENS)
        Cs = load_readers(
            C_ptr + tl.minimum(at, count - 1) * C_token, C_token, tl.maximum(left, 1), PARTS, C_ALIGNED, TOKENS
        )
        for t in tl.static_range(TOKENS - 1, -1, -1):
            step = time_step(dts[t], bias, SOFTPLUS)
            if SOFTPLUS:
                step = tl.where(t < left, step, 0.0)
            total += step
            g = dys[t].to(tl.float32)
            if GATED:
                z = zs[t].to(tl.float32)
                g = g * z * opened(z)
            r = back_through(r, rates, step, step, g, Cs[t], PARTS)
    tl.store(sums_ptr + (row * chunks + part) * channels + d, total, mask=here)
    store_states(ends_ptr + (row * (chunks + 1) + part) * size, across, channels, channels, 1, r, PARTS)


@triton.jit(do_not_specialize=["chunks"])
def carry_back_kernel(
    ends_ptr,
    sums_ptr,
    A_ptr,
    last_ptr,
    chunks,
    channels,
    states,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Turn what each chunk makes of no gradient into the gradient of the state before it, in place.

    Grid (blocks of N D states, sequences). `last` (B, N, D) is the gradient of the state after the last chunk; it goes
    to the last place of `ends`.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    size = channels * states
    here = i < size
    rate = tl.load(A_ptr + i % channels * states + i // channels, mask=here, other=0.0) * LOG2_E
    r = tl.load(last_ptr + row * size + i, mask=here, other=0.0)
    ends_ptr += row * (chunks + 1) * size + i[None, :]
    sums_ptr += row * chunks * channels + (i % channels)[None, :]
    tl.store(ends_ptr + chunks.to(tl.int64) * size, r[None, :], mask=here[None, :])
    for first in range(0, chunks, GROUP):
        c = (chunks - 1 - first - tl.arange(0, GROUP)).to(tl.int64)[:, None]
        there = (c >= 0) & here[None, :]
        total = tl.load(sums_ptr + c * channels, mask=there, other=0.0)
        made = tl.load(ends_ptr + c * size, mask=there, other=0.0)
        through, made = tl.associative_scan((tl.exp2(total * rate[None, :]), made), 0, chain)
        state = through * r[None, :] + made
        tl.store(ends_ptr + c * size, state, mask=there)
        r = last_of(state, GROUP)


@triton.jit(do_not_specialize=["length", "chunk", "chunks", "first_block", "zero"])
def chunk_gradients_kernel(
    u_ptr,
    u_batch,
    u_token,
    dt_ptr,
    dt_batch,
    dt_token,
    z_ptr,
    z_batch,
    z_token,
    B_ptr,
    B_batch,
    B_token,
    C_ptr,
    C_batch,
    C_token,
    dy_ptr,
    dy_batch,
    dy_token,
    A_ptr,
    bias_ptr,
    skip_ptr,
    starts_ptr,
    ends_ptr,
    du_ptr,
    ddt_ptr,
    dz_ptr,
    d_batch,
    dB_ptr,
    dC_ptr,
    sums_ptr,
    first_block,
    length,
    chunk,
    chunks,
    channels,
    states,
    zero,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    B_ALIGNED: tl.constexpr,
    C_ALIGNED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
):
    """The gradients of one chunk of tokens of a block of channels, TOKENS of them at a time.

    Grid (blocks of channels from `first_block` on, chunks, sequences). `starts` (B, chunks, N, D), the states before
    the chunks, is overwritten with each chunk's share of dA'; `ends` (B, chunks + 1, N, D) holds the gradients of the
    states around them. `du`, `ddt`, `dz` (B, any, D) lie together but for `d_batch`; `dB`, `dC` (blocks, B, L, N) are
    sums over the block's channels; `sums` (2, B, chunks, D) becomes each chunk's share of dD and of the bias of dt.
    """
    d = (first_block + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    across = d + zero  # the same, but Triton does not know of neighbours, so that a lane keeps one channel
    part, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = d < channels
    size = channels * states
    first = part.to(tl.int64) * chunk
    count = tl.minimum(length - part * chunk, chunk)
    slot = row * chunks + part
    starts_ptr += slot * size
    u_ptr += row * u_batch + first * u_token
    dt_ptr += row * dt_batch + first * dt_token
    z_ptr += row * z_batch + first * z_token
    B_ptr += row * B_batch + first * B_token
    C_ptr += row * C_batch + first * C_token
    dy_ptr += row * dy_batch + first * dy_token
    rates = load_rates(A_ptr, starts_ptr, across, here, length < 0, channels, states, PARTS)
    r = load_states(ends_ptr + (row * (chunks + 1) + part + 1) * size, across, here, channels, 1, PARTS)
    bias = tl.load(bias_ptr + d, mask=here, other=0.0) if SOFTPLUS else 0.0
    skip = tl.load(skip_ptr + d, mask=here, other=0.0).to(tl.float32)
    written = (first * channels + row * d_batch) + d
    reader = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row) * length + first
    d_rates = zero_tiles(PARTS, BLOCK)
    d_skip, d_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last = (count - 1) // TOKENS * TOKENS
    for done in range(0, count, TOKENS):
        at = (last - done).to(tl.int64)
        left = count - (last - done)
        h = load_states(starts_ptr, across, here, channels, 1, PARTS)
        for replayed in range(0, last - done, TOKENS):
            dts = load_rows(dt_ptr + replayed * dt_token, dt_token, TOKENS, d, channels, TOKENS)
            us = load_rows(u_ptr + replayed * u_token, u_token, TOKENS, d, channels, TOKENS)
            Bs = load_readers(B_ptr + replayed * B_token, B_token, TOKENS, PARTS, B_ALIGNED, TOKENS)
            for k in tl.static_range(TOKENS):
                step = time_step(dts[k], bias, SOFTPLUS)
                h = advance(h, rates, step, step * us[k].to(tl.float32), Bs[k], PARTS)
        us = load_rows(u_ptr + at * u_token, u_token, left, d, channels, TOKENS)
        dts = load_rows(dt_ptr + at * dt_token, dt_token, left, d, channels, TOKENS)
        dys = load_rows(dy_ptr + at * dy_token, dy_token, left, d, channels, TOKENS)
        if GATED:
            zs = load_rows(z_ptr + at * z_token, z_token, left, d, channels, TOKENS)
        Bs = load_readers(B_ptr + at * B_token, B_token, left, PARTS, B_ALIGNED, TOKENS)
        Cs = load_readers(C_ptr + at * C_token, C_token, left, PARTS, C_ALIGNED, TOKENS)
        steps, befores = (), ()
        for k in tl.static_range(TOKENS):
            step = time_step(dts[k], bias, SOFTPLUS)
            if SOFTPLUS:
                step = tl.where((k < left) & here, step, 0.0)
            steps = steps + (step,)
            befores = befores + (h,)
            h = advance(h, rates, step, step * us[k].to(tl.float32), Bs[k], PARTS)
        for t in tl.static_range(TOKENS - 1, -1, -1):
            before, step, u, g = befores[t], steps[t], us[t].to(tl.float32), dys[t].to(tl.float32)
            inside = t < left
            if GATED:
                z = zs[t].to(tl.float32)
                gate = opened(z)
                out = read_out(h, Cs[t], PARTS) + skip * u
                dz = g * out * gate * (1 + z * (1 - gate))
                tl.store(dz_ptr + written + (at + t) * channels, dz.to(dz_ptr.dtype.element_ty), mask=here & inside)
                g = g * z * gate
            d_drive, d_power = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            earlier, grown = (), ()
            n = 0
            for i in tl.static_range(len(PARTS)):
                to = (reader + at + t) * states + n + tl.arange(0, PARTS[i])
                through = r[i] + g[None, :] * Cs[t][i].to(tl.float32)[:, None]
                tl.store(dC_ptr + to, tl.sum(h[i] * g[None, :], axis=1), mask=inside)
                tl.store(dB_ptr + to, tl.sum(through * (step * u)[None, :], axis=1), mask=inside)
                d_drive += tl.sum(through * Bs[t][i].to(tl.float32)[:, None], axis=0)
                through *= tl.exp2(step[None, :] * rates[i])
                power = through * before[i]
                d_power += tl.sum(power * rates[i], axis=0)
                grown = grown + (d_rates[i] + power * step[None, :],)
                earlier = earlier + (through,)
                n += PARTS[i]
            r, d_rates, h = earlier, grown, before
            d_step = d_drive * u + d_power * LN_2
            if SOFTPLUS:
                d_step *= opened(dts[t].to(tl.float32) + bias)
                d_bias += tl.where(inside, d_step, 0.0)
            d_skip += g * u
            tl.store(
                du_ptr + written + (at + t) * channels,
                (d_drive * step + g * skip).to(du_ptr.dtype.element_ty),
                mask=here & inside,
            )
            tl.store(ddt_ptr + written + (at + t) * channels, d_step.to(ddt_ptr.dtype.element_ty), mask=here & inside)
    store_states(starts_ptr, across, channels, channels, 1, d_rates, PARTS)
    sums_ptr += slot * channels + d
    tl.store(sums_ptr, d_skip, mask=here)
    tl.store(sums_ptr + tl.num_programs(2).to(tl.int64) * chunks * channels, d_bias, mask=here)


class Gradients(NamedTuple):
    """Gradients of the state and of every field of `ScanInputs`, in that order."""

    state: torch.Tensor
    u: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None


class SelectiveScan(torch.autograd.Function):
    """The scan with first derivatives for everything it reads."""

    @staticmethod
    def forward(
        ctx: Any, state: torch.Tensor | None, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the scan; `tensors` are the fields of `ScanInputs` in their order."""
        inputs = ScanInputs(*tensors)
        ctx.save_for_backward(state, *tensors)
        ctx.set_materialize_grads(False)
        return run(inputs, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, d_last: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the state and of every field, each in the dtype of what it belongs to."""
        state, *tensors = ctx.saved_tensors
        inputs = ScanInputs(*tensors)
        dy = torch.zeros_like(inputs.u) if dy is None else dy
        with torch.cuda.device_of(inputs.u):
            found = gradients(inputs, state, dy, d_last)
        return tuple(
            None if tensor is None else gradient.to(tensor.dtype)
            for tensor, gradient in zip((state, *tensors), found, strict=True)
        )


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out, with gradients for everything it reads."""
    fields = (inputs.u, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias)
    return SelectiveScan.apply(state, *fields)


def gradients(
    inputs: ScanInputs,
    state: torch.Tensor | None,
    dy: torch.Tensor,
    d_last: torch.Tensor | None,
    stretch_bytes: int | None = None,
) -> Gradients:
    """Gradients of a loss, from those of the output and of the final state.

    Args:
        inputs: what the scan read.
        state: (B, D, N) before the first token, or None for zeros.
        dy: (B, L, D).
        d_last: (B, D, N), or None for zeros.
        stretch_bytes: memory for the states that the chunks of a stretch start from, and for what blocks of channels
            add to the gradients of B and C; None takes as much as keeps the whole within twice the forward's memory.
    """
    tokens = 8 if inputs.d_state <= 8 else 4  # the states of more do not fit into registers
    states_bytes = stretch_bytes or max(STATES_BYTES, int(STATES_SHARE * inputs.u.nbytes))
    readers_bytes = stretch_bytes or max(READERS_BYTES, int(READERS_SHARE * inputs.u.nbytes))
    chunks = max(1, states_bytes // (4 * inputs.batch * inputs.d_inner * inputs.d_state))
    stretch = min(chunks * CHUNK, triton.cdiv(inputs.length, tokens) * tokens)
    coarse = Chunked(inputs, state, Chunks(BLOCK, 1, tokens, stretch))  # the states before each stretch
    found = _empty(inputs)
    shape = (inputs.batch, inputs.d_state, inputs.d_inner)
    r = inputs.u.new_zeros(shape, dtype=torch.float32) if d_last is None else d_last.float().mT.contiguous()
    for i in reversed(range(coarse.chunks)):
        here = slice(i * stretch, (i + 1) * stretch)
        start = None if coarse.starts is None else coarse.starts[:, i].mT
        sequences = {name: getattr(inputs, name) for name in ("u", "dt", "B", "C", "z")}
        cut = replace(inputs, **{name: t if t is None else t[:, here] for name, t in sequences.items()})
        r = _Stretch(cut, start, dy[:, here], tokens, readers_bytes).add_to(found, r, here)
    return found._replace(state=r.mT)


def _empty(inputs: ScanInputs) -> Gradients:
    """Room for the gradients; what is added up over stretches starts from zero."""
    u, f32 = inputs.u, torch.float32
    channels = u.new_zeros(inputs.d_inner, dtype=f32)
    return Gradients(
        channels,
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(u.shape, dtype=inputs.dt.dtype, device=u.device),
        u.new_zeros(inputs.A.shape, dtype=f32),
        u.new_empty(inputs.B.shape, dtype=f32),
        u.new_empty(inputs.C.shape, dtype=f32),
        channels.clone(),
        None if inputs.z is None else torch.empty(u.shape, dtype=inputs.z.dtype, device=u.device),
        None if inputs.dt_bias is None else channels.clone(),
    )


class _Stretch:
    """The backward pass over a stretch of tokens."""

    def __init__(
        self, inputs: ScanInputs, start: torch.Tensor | None, dy: torch.Tensor, tokens: int, readers_bytes: int
    ):
        self.inputs, self.tokens = inputs, tokens
        self.dy = dy if dy.stride(2) == 1 else dy.contiguous()
        self.scan = Chunked(inputs, start, Chunks(BLOCK, 1, tokens, CHUNK))
        self.blocks, self.chunks, self.batch = self.scan.grid
        of_a_block = 8 * self.batch * inputs.length * inputs.d_state
        self.together = max(1, min(self.blocks, readers_bytes // of_a_block))  # blocks of channels

    def add_to(self, found: Gradients, r: torch.Tensor, where: slice) -> torch.Tensor:
        """Write or add the gradients of the stretch, given that of the state after it; that of the state before it."""
        ends, sums = self._ends(r)
        self._launch(found, ends, sums, where)
        starts = self.scan.starts
        found.A.add_(starts.sum((0, 1)).t())
        found.D.add_(sums[0].sum((0, 1)))
        if found.dt_bias is not None:
            found.dt_bias.add_(sums[1].sum((0, 1)))
        return ends[:, 0]

    def _ends(self, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the states around all chunks, (B, chunks + 1, N, D), and (2, B, chunks, D) to work in."""
        inputs, scan, batch = self.inputs, self.scan, self.batch
        N, D = inputs.d_state, inputs.d_inner
        ends = torch.empty(batch, self.chunks + 1, N, D, dtype=torch.float32, device=r.device)
        sums = torch.empty(2, batch, self.chunks, D, dtype=torch.float32, device=r.device)
        chunk_tails_kernel[scan.grid](
            *(*scan.sequences[3:9], *scan.sequences[12:], *self._strided(self.dy)),
            *(scan.A, scan.bias, ends, sums, inputs.length, scan.chunk, self.chunks, D, N, 0),
            **self._options("B_ALIGNED"),
        )
        group = carried_together(self.chunks)
        block = CARRIED // group
        carry_back_kernel[triton.cdiv(N * D, block), batch](
            *(ends, sums, scan.A, r.contiguous(), self.chunks, D, N),
            BLOCK=block,
            GROUP=group,
            num_warps=4,
        )
        return ends, sums

    def _launch(self, found: Gradients, ends: torch.Tensor, sums: torch.Tensor, where: slice) -> None:
        """Run `chunk_gradients_kernel` for all blocks of channels, as many together as there is memory for."""
        inputs, scan = self.inputs, self.scan
        if self.chunks == 1:  # it starts from zero, or from a state that may be the caller's, and is written to
            zeros = torch.zeros(self.batch, 1, inputs.d_state, inputs.d_inner, dtype=torch.float32, device=ends.device)
            scan.starts = zeros if scan.starts is None else scan.starts.clone()
        shape = (2, self.together, self.batch, inputs.length, inputs.d_state)
        readers = torch.empty(shape, dtype=torch.float32, device=ends.device)  # of B and of C
        du, ddt = found.u[:, where], found.dt[:, where]
        dz = du if found.z is None else found.z[:, where]
        for first in range(0, self.blocks, self.together):
            blocks = min(self.together, self.blocks - first)
            chunk_gradients_kernel[blocks, self.chunks, self.batch](
                *(*scan.sequences, *self._strided(self.dy)),
                *(scan.A, scan.bias, inputs.D.contiguous(), scan.starts, ends, du, ddt, dz, du.stride(0)),
                *(*readers, sums, first, inputs.length, scan.chunk, self.chunks, inputs.d_inner, inputs.d_state, 0),
                **self._options(),
            )
            for whole, parts in zip((found.B, found.C), readers, strict=True):
                if first:
                    whole[:, where] += parts[:blocks].sum(0)
                else:
                    torch.sum(parts[:blocks], 0, out=whole[:, where])

    def _strided(self, tensor: torch.Tensor) -> Sequence[Any]:
        return tensor, tensor.stride(0), tensor.stride(1)

    def _options(self, *without: str) -> dict[str, Any]:
        options = {**self.scan.options, "TOKENS": self.tokens, "GATED": self.inputs.z is not None}
        return {name: value for name, value in options.items() if name not in (*without, "LANE")}
