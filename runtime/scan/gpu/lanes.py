"""The scan with time along the lanes of a warp: each exponential once, one launch, one program for a few channels.

A recurrence h_t = a_t h_{t-1} + b_t is associative in the pairs (a, b), so that time can be split among lanes. A warp
has one channel. Each of its lanes holds V R consecutive tokens; for each state the warp computes a_t and b_t of all of
them, folds each lane's tokens to one pair, scans the 32 pairs by shuffles, and lets each lane run through its tokens
once more from the state the lanes before it leave behind. States come one after the other: N of them cost N turns of
that loop, whatever N is. The state at the end of a tile of 32 V R tokens waits in memory (`final`) for the next tile.

Loads of B and C must give a lane V numbers at once, so a first, small kernel (`pack_kernel`) lays them out with time
last, in the order in which the lanes hold it. u, dt and z are read as they lie and change places in shared memory, once
a tile and not once a state. The row of ones that `pack_kernel` appends says which tokens exist; multiplying by it also
tells Triton to keep everything in the layout in which that row was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        runs: vectors of V tokens that a lane holds of a channel; V is 16 bytes of B.
        wide: B and C are laid out in float32 whatever they are: fewer conversions, more bytes, V = 4.
    """

    channels: int = 4
    warps: int = 4
    runs: int = 2
    wide: bool = False


@triton.jit
def chain(a, h, b, g):
    """The pair (decay, state) of two stretches of time, the second one after the first."""
    return a * b, b * h + g


@triton.jit
def later(a, b):
    """The second of two: reduces to the last where one lane has all of the axis. Between lanes no order is kept."""
    return b


@triton.jit
def load_turned(ptr, t, token, d, channel, length, channels, CHANNELS: tl.constexpr, V: tl.constexpr):
    """Tokens t of channels d, 0 where there are none, as (CHANNELS, lanes, V) float32."""
    wanted = (t < length)[:, None] & (d < channels)[None, :]
    x = tl.load(ptr + t[:, None] * token + d[None, :] * channel, mask=wanted, other=0.0)
    return tl.reshape(tl.trans(x), (CHANNELS, WARP, V)).to(tl.float32)


@triton.jit
def load_vectors(ptr, at, CHANNELS: tl.constexpr, V: tl.constexpr):
    """A stretch of a packed row, the same for all channels, as (CHANNELS, lanes, V)."""
    return tl.reshape(tl.load(ptr + at), (CHANNELS, WARP, V))


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
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """All outputs of a few channels of one sequence, and their final states.

    Grid (blocks of channels, sequences). `packed` (B, 2 N + 1, padded): rows of B, of C, and of ones; `A` (D, N);
    `state` (B, D, N) before the first token, read if CONTINUES; `y` (B, L, D) and `final` (B, D, N), all contiguous.
    """
    TILE: tl.constexpr = WARP * V
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
    spread = tl.arange(0, TILE) // V * (V * RUNS) + tl.arange(0, TILE) % V  # tokens of the first run
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
    for first in range(0, padded, TILE * RUNS):
        tl.debug_barrier()  # what other lanes stored of `final` is there
        B_ptr = packed_ptr + first
        C_ptr = B_ptr + states * width
        steps, drives, ys, B_later, C_later = (), (), (), (), ()
        total = tl.zeros((CHANNELS, WARP), tl.float32)
        for r in tl.static_range(RUNS):
            t = first + spread + r * V
            u = load_turned(u_ptr, t.to(tl.int64), u_token, d, u_channel, length, channels, CHANNELS, V)
            step = load_turned(dt_ptr, t.to(tl.int64), dt_token, d, dt_channel, length, channels, CHANNELS, V)
            if SOFTPLUS:
                step = softplus(step + bias)
            step *= load_vectors(C_ptr + states * width + r * TILE, at, CHANNELS, V).to(tl.float32)
            total += tl.sum(step, axis=2)
            steps = steps + (step,)
            drives = drives + (step * u,)
            ys = ys + (skip * u,)
            B_later = B_later + (load_vectors(B_ptr + r * TILE, at, CHANNELS, V),)
            C_later = C_later + (load_vectors(C_ptr + r * TILE, at, CHANNELS, V),)
        rate_later = tl.load(A_ptr, mask=here, other=0.0)
        carry_later = tl.load(final_ptr, mask=here, other=0.0)
        for n in range(0, states):
            rate, carry, Bs, Cs = rate_later * LOG2_E, carry_later, B_later, C_later
            # what the next turn reads is asked for now; past the last state it is another row that nobody looks at
            B_later, C_later = (), ()
            for r in tl.static_range(RUNS):
                B_later = B_later + (load_vectors(B_ptr + (n + 1) * width + r * TILE, at, CHANNELS, V),)
                C_later = C_later + (load_vectors(C_ptr + (n + 1) * width + r * TILE, at, CHANNELS, V),)
            more = here & (n + 1 < states)
            rate_later = tl.load(A_ptr + n + 1, mask=more, other=0.0)
            carry_later = tl.load(final_ptr + n + 1, mask=more, other=0.0)
            decays, inputs = (), ()
            h = tl.zeros((CHANNELS, WARP), tl.float32)
            for r in tl.static_range(RUNS):
                decay = tl.exp2(steps[r] * rate[:, None, None])
                driven = drives[r] * Bs[r].to(tl.float32)
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
                read = read + (ys[r] + after * Cs[r].to(tl.float32),)
                h = tl.reduce(after, 2, later)
            ys = read
            tl.store(final_ptr[:, None] + (n - (WARP - 1) + lane), end, mask=closing)
        for r in tl.static_range(RUNS):
            t = first + spread + r * V
            y = ys[r]
            if GATED:
                z = load_turned(z_ptr, t.to(tl.int64), z_token, d, z_channel, length, channels, CHANNELS, V)
                y = y * silu(z)
            out = tl.trans(tl.reshape(y.to(y_ptr.dtype.element_ty), (CHANNELS, TILE)))
            wanted = (t < length)[:, None] & here[None, :]
            tl.store(y_ptr + t.to(tl.int64)[:, None] * channels + d[None, :], out, mask=wanted)


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
    STATES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Rows of B, of C and of ones with time last, zeros where there is no token, in the order `lanes_kernel` reads.

    Grid (blocks of positions, sequences). Position (tile, run, lane, v) of a row has token (tile, lane, run, v).
    """
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    row = tl.program_id(1).to(tl.int64)
    inside = position % (32 * V * RUNS)
    t = position - inside + inside // V % 32 * (V * RUNS) + inside // (32 * V) * V + inside % V
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


def pack(inputs: ScanInputs, plan: Lanes) -> tuple[torch.Tensor, int]:
    """B, C and a row of ones as (B, 2 N + 1, padded), and V, the tokens of a vector."""
    same = inputs.B.dtype if inputs.B.dtype == inputs.C.dtype else torch.float32
    dtype = torch.float32 if plan.wide else same
    vector = VECTOR_BYTES // dtype.itemsize
    tile = WARP.value * vector * plan.runs
    padded = triton.cdiv(inputs.length, tile) * tile
    N = inputs.d_state
    packed = torch.empty(inputs.batch, 2 * N + 1, padded, dtype=dtype, device=inputs.u.device)
    pack_kernel[triton.cdiv(padded, PACKED), inputs.batch](
        *(inputs.B, *inputs.B.stride(), inputs.C, *inputs.C.stride()),
        *(packed, inputs.length, padded, N),
        V=vector,
        RUNS=plan.runs,
        STATES=triton.next_power_of_2(N),
        POSITIONS=PACKED,
        num_warps=4,
    )
    return packed, vector


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None, plan: Lanes) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for tensors of a GPU."""
    packed, vector = pack(inputs, plan)
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
        V=vector,
        RUNS=plan.runs,
        SOFTPLUS=inputs.dt_bias is not None,
        GATED=inputs.z is not None,
        CONTINUES=state is not None,
        num_warps=plan.warps,
        enable_fp_fusion=True,
    )
    return y, final
