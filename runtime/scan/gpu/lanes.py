"""The scan with time along the lanes of a warp: each exponential once, one launch, one program for a few channels.

A recurrence h_t = a_t h_{t-1} + b_t is associative in the pairs (a, b), so that time can be split among lanes. A warp
has one channel. Each of its lanes holds 8 or 16 consecutive tokens; for each state the warp computes a_t and b_t of all
of them, folds each lane's tokens to one pair, scans the 32 pairs by shuffles, and lets each lane run through its tokens
once more from the state the lanes before it leave behind. States come one after the other: N of them cost N turns of
that loop, whatever N is. The state at the end of a tile of 256 or 512 tokens waits in memory (`final`) for the next.

Loads of B and C must give a lane 16 bytes at once, so a first, small kernel (`pack_kernel`) lays them out with time
last, in the order in which the lanes hold it: in runs of V tokens, of which a lane has a few. u, dt and z are read as
they lie and change places in shared memory, once a tile and not once a state. The row of ones that `pack_kernel`
appends says which tokens exist; multiplying by it also tells Triton to keep everything in the layout of that row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.kernels import LOG2_E, silu, softplus
from ssmc.runtime.scan.inputs import ScanInputs

WARP = tl.constexpr(32)
VECTOR_BYTES = 16  # what a lane loads at once
PACKED = 128  # positions a program of `pack_kernel` writes


@dataclass(frozen=True)
class Lanes:
    """How the work is cut among programs.

    Attributes:
        channels: of a program.
        warps: of a program; a warp has channels / warps channels, whose instructions take turns.
        tokens: a lane holds of a channel at once.
        wide: B and C are laid out in float32 whatever they are: fewer conversions, more bytes.
        ahead: u and dt of the next tile are brought to the L2 cache while the present one is computed.
        registers: of a thread at most, so that more programs run side by side; 0: as many as it takes.
    """

    channels: int = 4
    warps: int = 4
    tokens: int = 16
    wide: bool = False
    ahead: bool = False
    registers: int = 0


@triton.jit
def chain(a, h, b, g):
    """The pair (decay, state) of two stretches of time, the second one after the first."""
    return a * b, b * h + g


@triton.jit
def later(a, b):
    """The second of two: reduces to the last where one lane has all of the axis. Between lanes no order is kept."""
    return b


@triton.jit
def load_runs(ptr, offsets, token, t, left, here, V: tl.constexpr, RUNS: tl.constexpr):
    """Tokens t, t + V, ... of a few channels as they are stored, or 0: RUNS tiles (tokens, CHANNELS)."""
    runs = ()
    for r in tl.static_range(RUNS):
        wanted = (t + r * V < left)[:, None] & here[None, :]
        runs = runs + (tl.load(ptr + offsets + r * V * token, mask=wanted, other=0.0),)
    return runs


@triton.jit
def fetch(ptr, t, token, left, V: tl.constexpr, RUNS: tl.constexpr):
    """Have what `load_runs` will load brought to the L2 cache: one channel of it, its neighbours come with it."""
    for r in tl.static_range(RUNS):
        at = ptr + tl.minimum(t + r * V, left - 1).to(tl.int64) * token
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def turned(x, CHANNELS: tl.constexpr, V: tl.constexpr):
    """(tokens, CHANNELS) as (CHANNELS, lanes, V) float32."""
    return tl.reshape(tl.trans(x), (CHANNELS, WARP, V)).to(tl.float32)


@triton.jit
def load_packed(ptr, at, CHANNELS: tl.constexpr, V: tl.constexpr, LOADS: tl.constexpr):
    """A stretch of a packed row, the same for all channels: LOADS tiles (CHANNELS, lanes, V)."""
    tiles = ()
    for i in tl.static_range(LOADS):
        tiles = tiles + (tl.reshape(tl.load(ptr + (i * WARP * V) + at), (CHANNELS, WARP, V)),)
    return tiles


@triton.jit
def unpacked(tiles, r, PAIRS: tl.constexpr):
    """Run r of a packed row in float32. Two runs of bfloat16 are one of words: the first their lower halves."""
    if PAIRS:
        if r % 2 == 0:
            x = (tiles[r // 2] << 16).to(tl.float32, bitcast=True)
        else:
            x = (tiles[r // 2] & -65536).to(tl.float32, bitcast=True)
    else:
        x = tiles[r].to(tl.float32)
    return x


@triton.jit(do_not_specialize=["length", "states"])
def lanes_kernel(
    u_ptr,
    u_batch,
    u_token,
    u_channel,
    dt_ptr,
    dt_batch,
    dt_token,
    dt_channel,
    z_ptr,
    z_batch,
    z_token,
    z_channel,
    packed_ptr,
    A_ptr,
    bias_ptr,
    skip_ptr,
    state_ptr,
    y_ptr,
    final_ptr,
    length,
    padded,
    channels,
    states,
    CHANNELS: tl.constexpr,
    V: tl.constexpr,
    RUNS: tl.constexpr,
    PAIRS: tl.constexpr,
    AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """All outputs of a few channels of one sequence, and their final states.

    Grid (blocks of channels, sequences). `packed` (B, 2 N + 1, padded): rows of B, of C, and of ones; `A` (D, N);
    `state` (B, D, N) before the first token, read if CONTINUES; `y` (B, L, D) and `final` (B, D, N), all contiguous.
    """
    TILE: tl.constexpr = WARP * V
    TOKENS: tl.constexpr = TILE * RUNS
    LOADS: tl.constexpr = RUNS // 2 if PAIRS else RUNS
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(1).to(tl.int64)
    here = d < channels
    width = padded.to(tl.int64)
    u_ptr += row * u_batch
    dt_ptr += row * dt_batch
    z_ptr += row * z_batch
    y_ptr += row * length * channels
    packed_ptr += row * (2 * states + 1) * width
    A_ptr += d * states
    final_ptr += (row * channels + d) * states
    state_ptr += (row * channels + d) * states
    lane = tl.arange(0, WARP)[None, :]
    at = tl.arange(0, TILE)[None, :] + tl.zeros((CHANNELS, 1), tl.int32)
    t = tl.arange(0, TILE) // V * (V * RUNS) + tl.arange(0, TILE) % V  # tokens of the first run
    u_at = t[:, None] * u_token + d[None, :] * u_channel
    dt_at = t[:, None] * dt_token + d[None, :] * dt_channel
    z_at = t[:, None] * z_token + d[None, :] * z_channel
    opening = (tl.arange(0, V) == 0)[None, None, :]
    before = tl.maximum(lane - 1, 0) + tl.zeros((CHANNELS, 1), tl.int32)
    closing = (lane == WARP - 1) & here[:, None]
    bias = tl.load(bias_ptr + d, mask=here, other=0.0)[:, None, None] if SOFTPLUS else 0.0
    skip = tl.load(skip_ptr + d, mask=here, other=0.0).to(tl.float32)[:, None, None]
    for n in range(0, states):
        if CONTINUES:
            tl.store(final_ptr + n, tl.load(state_ptr + n, mask=here), mask=here)
        else:
            tl.store(final_ptr + n, tl.zeros((CHANNELS,), tl.float32), mask=here)
    hop = tl.full((), TOKENS, tl.int64)
    left = length
    while left > 0:
        tl.debug_barrier()  # what other lanes stored of `final` is there
        C_ptr = packed_ptr + states * width
        us = load_runs(u_ptr, u_at, u_token, t, left, here, V, RUNS)
        dts = load_runs(dt_ptr, dt_at, dt_token, t, left, here, V, RUNS)
        if GATED:
            zs = load_runs(z_ptr, z_at, z_token, t, left, here, V, RUNS)
        there = load_packed(C_ptr + states * width, at, CHANNELS, V, LOADS)
        B_later = load_packed(packed_ptr, at, CHANNELS, V, LOADS)
        C_later = load_packed(C_ptr, at, CHANNELS, V, LOADS)
        steps, drives, ys = (), (), ()
        total = tl.zeros((CHANNELS, WARP), tl.float32)
        for r in tl.static_range(RUNS):
            u = turned(us[r], CHANNELS, V)
            step = turned(dts[r], CHANNELS, V)
            if SOFTPLUS:
                step = softplus(step + bias)
            step *= unpacked(there, r, PAIRS)
            total += tl.sum(step, axis=2)
            steps = steps + (step,)
            drives = drives + (step * u,)
            ys = ys + (skip * u,)
        u_ptr += hop * u_token
        dt_ptr += hop * dt_token
        z_ptr += hop * z_token
        if AHEAD and left > TOKENS:
            fetch(u_ptr, t, u_token, left - TOKENS, V, RUNS)
            fetch(dt_ptr, t, dt_token, left - TOKENS, V, RUNS)
        rate_later = tl.load(A_ptr, mask=here, other=0.0)
        carry_later = tl.load(final_ptr, mask=here, other=0.0)
        for n in range(0, states):
            rate, carry, Bs, Cs = rate_later * LOG2_E, carry_later, B_later, C_later
            # what the next turn reads is asked for now; past the last state it is another row that nobody looks at
            B_later = load_packed(packed_ptr + (n + 1) * width, at, CHANNELS, V, LOADS)
            C_later = load_packed(C_ptr + (n + 1) * width, at, CHANNELS, V, LOADS)
            more = here & (n + 1 < states)
            rate_later = tl.load(A_ptr + n + 1, mask=more, other=0.0)
            carry_later = tl.load(final_ptr + n + 1, mask=more, other=0.0)
            decays, inputs = (), ()
            h = tl.zeros((CHANNELS, WARP), tl.float32)
            for r in tl.static_range(RUNS):
                decay = tl.exp2(steps[r] * rate[:, None, None])
                driven = drives[r] * unpacked(Bs, r, PAIRS)
                through, made = tl.reduce((decay, driven), 2, chain)
                h = through * h + made
                decays = decays + (decay,)
                inputs = inputs + (driven,)
            through, made = tl.associative_scan((tl.exp2(total * rate[:, None]), h), 1, chain)
            end = through * carry[:, None] + made  # the state after each lane
            h = tl.where(lane == 0, carry[:, None], tl.gather(end, before, 1))
            read = ()
            for r in tl.static_range(RUNS):
                driven = tl.where(opening, decays[r] * h[:, :, None] + inputs[r], inputs[r])
                _, after = tl.associative_scan((decays[r], driven), 2, chain)
                read = read + (ys[r] + after * unpacked(Cs, r, PAIRS),)
                h = tl.reduce(after, 2, later)
            ys = read
            tl.store(final_ptr[:, None] + (n - (WARP - 1) + lane), end, mask=closing)
        for r in tl.static_range(RUNS):
            y = ys[r]
            if GATED:
                y = y * silu(turned(zs[r], CHANNELS, V))
            out = tl.trans(tl.reshape(y.to(y_ptr.dtype.element_ty), (CHANNELS, TILE)))
            wanted = (t + r * V < left)[:, None] & here[None, :]
            tl.store(y_ptr + (t + r * V)[:, None] * channels + d[None, :], out, mask=wanted)
        y_ptr += hop * channels
        packed_ptr += TILE * LOADS
        left -= TOKENS


@triton.jit(do_not_specialize=["length", "states"])
def pack_kernel(
    B_ptr,
    B_batch,
    B_token,
    B_state,
    C_ptr,
    C_batch,
    C_token,
    C_state,
    packed_ptr,
    length,
    padded,
    states,
    V: tl.constexpr,
    RUNS: tl.constexpr,
    PAIRS: tl.constexpr,
    STATES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Rows of B, of C and of ones with time last, zeros where there is no token, in the order `lanes_kernel` reads.

    Grid (blocks of positions, sequences). Position (tile, run, lane, v) of a row has token (tile, lane, run, v); with
    PAIRS position (tile, pair of runs, lane, v, run of the pair).
    """
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    row = tl.program_id(1).to(tl.int64)
    inside = position % (32 * V * RUNS)
    if PAIRS:
        run = inside // (64 * V) * 2 + inside % 2
        within = inside // 2 % (32 * V)
    else:
        run = inside // (32 * V)
        within = inside % (32 * V)
    t = position - inside + within // V * (V * RUNS) + run * V + within % V
    n = tl.arange(0, STATES)
    packed_ptr += row * (2 * states + 1) * padded.to(tl.int64)
    there = (t < length)[:, None] & (n < states)[None, :]
    kept = (n < states)[:, None] & (position < padded)[None, :]
    to = n.to(tl.int64)[:, None] * padded + position[None, :]
    B = tl.load(B_ptr + row * B_batch + t.to(tl.int64)[:, None] * B_token + n[None, :] * B_state, mask=there, other=0.0)
    tl.store(packed_ptr + to, tl.trans(B).to(packed_ptr.dtype.element_ty), mask=kept)
    C = tl.load(C_ptr + row * C_batch + t.to(tl.int64)[:, None] * C_token + n[None, :] * C_state, mask=there, other=0.0)
    packed_ptr += states * padded.to(tl.int64)
    tl.store(packed_ptr + to, tl.trans(C).to(packed_ptr.dtype.element_ty), mask=kept)
    ones = tl.where(t < length, 1.0, 0.0).to(packed_ptr.dtype.element_ty)
    tl.store(packed_ptr + states * padded.to(tl.int64) + position, ones, mask=position < padded)


def pack(inputs: ScanInputs, plan: Lanes) -> tuple[torch.Tensor, dict[str, Any]]:
    """B, C and a row of ones as (B, 2 N + 1, any), and what both kernels must know of it."""
    same = inputs.B.dtype if inputs.B.dtype == inputs.C.dtype else torch.float32
    dtype = torch.float32 if plan.wide else same
    pairs = dtype == torch.bfloat16
    vector = VECTOR_BYTES // (4 if pairs else dtype.itemsize)
    runs = max(2 if pairs else 1, plan.tokens // vector)
    tile = WARP.value * vector * runs
    padded = triton.cdiv(inputs.length, tile) * tile
    N = inputs.d_state
    packed = torch.empty(inputs.batch, 2 * N + 1, padded, dtype=dtype, device=inputs.u.device)
    layout = {"V": vector, "RUNS": runs, "PAIRS": pairs}
    pack_kernel[triton.cdiv(padded, PACKED), inputs.batch](
        *(inputs.B, *inputs.B.stride(), inputs.C, *inputs.C.stride()),
        *(packed, inputs.length, padded, N),
        **layout,
        STATES=triton.next_power_of_2(N),
        POSITIONS=PACKED,
        num_warps=4,
    )
    return packed.view(torch.int32) if pairs else packed, layout


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None, plan: Lanes) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for tensors of a GPU."""
    packed, layout = pack(inputs, plan)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = y.new_empty(inputs.batch, inputs.d_inner, inputs.d_state, dtype=torch.float32)
    z = inputs.u if inputs.z is None else inputs.z
    before = final if state is None else state.float().contiguous()
    lanes_kernel[triton.cdiv(inputs.d_inner, plan.channels), inputs.batch](
        *(inputs.u, *inputs.u.stride(), inputs.dt, *inputs.dt.stride(), z, *z.stride()),
        *(packed, inputs.A.float().contiguous()),
        inputs.dt if inputs.dt_bias is None else inputs.dt_bias.float().contiguous(),
        *(inputs.D.contiguous(), before, y, final),
        *(inputs.length, packed.shape[2], inputs.d_inner, inputs.d_state),
        CHANNELS=plan.channels,
        **layout,
        AHEAD=plan.ahead and inputs.u.is_cuda,
        SOFTPLUS=inputs.dt_bias is not None,
        GATED=inputs.z is not None,
        CONTINUES=state is not None,
        num_warps=plan.warps,
        enable_fp_fusion=True,
        **({"maxnreg": plan.registers} if plan.registers else {}),
    )
    return y, final
