"""The scan with a strip of consecutive tokens of one channel for each thread: one launch, for few states and sequences.

A tile of (strips, channels) covers all tokens of a few channels, an element of it a thread. Each thread finds what its
strip makes of a zero state and the sum of its time steps; one scan over the strips, through shared memory, says what
state each starts from; then every thread goes through its strip once more and reads it out. So all exponentials but one
a strip are computed twice, as in `chunks`, but nothing in between goes through memory, no other kernel has to add
anything up, and a multiprocessor has dozens of warps to hide what one waits for.

A thread loads every number of B and C by itself, the same for all channels of a strip, so this pays where there are few
states. A row of channels is short; what a program reads of a cache line its neighbours read, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.chunks import rows
from ssmc.runtime.scan.gpu.kernels import LOG2_E, silu, time_step
from ssmc.runtime.scan.gpu.lanes import chain
from ssmc.runtime.scan.inputs import ScanInputs

WARP = 32


@dataclass(frozen=True)
class Strips:
    """How the work is cut among programs and threads.

    Attributes:
        strips: of the tokens of a channel, a power of two.
        channels: of a program, a power of two; a thread for each strip of each.
        tokens: loaded together.
        registers: of a thread at most, so that more programs run side by side; 0: as many as it takes.
    """

    strips: int = 64
    channels: int = 8
    tokens: int = 4
    registers: int = 0


@triton.jit
def load_tokens(ptr, at, token, t, last, here, TOKENS: tl.constexpr):
    """Token t of each strip and those behind it, as they are stored; zeros from the `last` on."""
    found = ()
    for k in tl.static_range(TOKENS):
        found = found + (tl.load(ptr + (at + k * token), mask=here & (t + k < last), other=0.0),)
    return found


@triton.jit
def load_readers(ptr, at, token, t, last, here, STATES: tl.constexpr, TOKENS: tl.constexpr):
    """All numbers of B or C of the same tokens, TOKENS times STATES tiles."""
    found = ()
    for k in tl.static_range(TOKENS):
        for n in tl.static_range(STATES):
            found = found + (tl.load(ptr + (at + k * token) + n, mask=here & (t + k < last), other=0.0),)
    return found


@triton.jit
def step_of(dt, bias, inside, SOFTPLUS: tl.constexpr):
    """A time step, 0 where there is no token."""
    step = time_step(dt, bias, SOFTPLUS)
    if SOFTPLUS:
        step = tl.where(inside, step, 0.0)
    return step


@triton.jit
def driven(h, rates, step, u, Bs, k: tl.constexpr, STATES: tl.constexpr):
    """The states behind the k-th of the tokens that were loaded."""
    after = ()
    drive = step * u.to(tl.float32)
    for n in tl.static_range(STATES):
        after = after + (tl.exp2(step * rates[n]) * h[n] + drive * Bs[k * STATES + n].to(tl.float32),)
    return after


@triton.jit(do_not_specialize=["length", "strip", "zero"])
def strips_kernel(
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
    A_ptr,
    bias_ptr,
    skip_ptr,
    state_ptr,
    y_ptr,
    final_ptr,
    length,
    strip,
    channels,
    zero,
    STATES: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    CONTINUES: tl.constexpr,
    ALIKE: tl.constexpr,
):
    """All outputs of a few channels of one sequence, and their final states.

    Grid (blocks of channels, sequences). A strip has `strip` tokens, a multiple of TOKENS. `A` (D, STATES); `state` (B,
    D, STATES) before the first token, read if CONTINUES; `y` (B, L, D) and `final` (B, D, STATES), all contiguous.
    ALIKE says that tokens of u, dt and y are as far apart as each other, and those of B and C.
    """
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    s = tl.arange(0, STRIPS)[:, None]
    row = tl.program_id(1).to(tl.int64)
    # Every address is that of a whole tile, also where it is the same along an axis: so all numbers come to the thread
    # that needs them, and none goes through shared memory. Offsets have 32 bits, which is half the registers.
    wide, deep = d + s * zero, s * strip + d * zero
    here = wide < channels
    u_ptr += row * u_batch
    dt_ptr += row * dt_batch
    z_ptr += row * z_batch
    B_ptr += row * B_batch
    C_ptr += row * C_batch
    y_ptr += row * length * channels
    rates, h = (), ()
    for n in tl.static_range(STATES):
        rates = rates + (tl.load(A_ptr + wide * STATES + n, mask=here, other=0.0) * LOG2_E,)
        h = h + (tl.zeros((STRIPS, CHANNELS), tl.float32),)
    bias = tl.load(bias_ptr + wide, mask=here, other=0.0) if SOFTPLUS else 0.0
    skip = tl.load(skip_ptr + wide, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros((STRIPS, CHANNELS), tl.float32)
    for done in range(0, strip, TOKENS):
        t = deep + done
        dt_at = t * dt_token + wide
        u_at = dt_at if ALIKE else t * u_token + wide
        us = load_tokens(u_ptr, u_at, u_token, t, length, here, TOKENS)
        dts = load_tokens(dt_ptr, dt_at, dt_token, t, length, here, TOKENS)
        Bs = load_readers(B_ptr, t * B_token, B_token, t, length, here, STATES, TOKENS)
        for k in tl.static_range(TOKENS):
            step = step_of(dts[k], bias, t + k < length, SOFTPLUS)
            total += step
            h = driven(h, rates, step, us[k], Bs, k, STATES)

    earlier = tl.maximum(s - 1, 0) + tl.zeros((STRIPS, CHANNELS), tl.int32)
    opening, closing = deep == 0, here & (s == STRIPS - 1)
    starts = ()
    for n in tl.static_range(STATES):
        through, end = tl.associative_scan((tl.exp2(total * rates[n]), h[n]), 0, chain)
        at = (row * channels + wide) * STATES + n
        if CONTINUES:
            before = tl.load(state_ptr + at, mask=here, other=0.0)
            end += through * before
        else:
            before = 0.0
        tl.store(final_ptr + at, end, mask=closing)
        starts = starts + (tl.where(opening, before, tl.gather(end, earlier, 0)),)
    h = starts

    for done in range(0, strip, TOKENS):
        t = deep + done
        dt_at = t * dt_token + wide
        u_at = dt_at if ALIKE else t * u_token + wide
        B_at = t * B_token
        C_at = B_at if ALIKE else t * C_token
        us = load_tokens(u_ptr, u_at, u_token, t, length, here, TOKENS)
        dts = load_tokens(dt_ptr, dt_at, dt_token, t, length, here, TOKENS)
        Bs = load_readers(B_ptr, B_at, B_token, t, length, here, STATES, TOKENS)
        Cs = load_readers(C_ptr, C_at, C_token, t, length, here, STATES, TOKENS)
        if GATED:
            zs = load_tokens(z_ptr, t * z_token + wide, z_token, t, length, here, TOKENS)
        y_at = u_at if ALIKE else t * channels + wide
        for k in tl.static_range(TOKENS):
            step = step_of(dts[k], bias, t + k < length, SOFTPLUS)
            h = driven(h, rates, step, us[k], Bs, k, STATES)
            y = skip * us[k].to(tl.float32)
            for n in tl.static_range(STATES):
                y += h[n] * Cs[k * STATES + n].to(tl.float32)
            if GATED:
                y = y * silu(zs[k].to(tl.float32))
            y_to = y_ptr + (y_at + k * (u_token if ALIKE else channels))
            tl.store(y_to, y.to(y_ptr.dtype.element_ty), mask=here & (t + k < length))


def fits(inputs: ScanInputs) -> bool:
    """Whether 32 bits are enough for where the numbers of a sequence lie."""
    tensors = (inputs.u, inputs.dt, inputs.B, inputs.C, *(() if inputs.z is None else (inputs.z,)))
    return (inputs.length + 64 * 1024) * max(t.stride(1) for t in tensors) < 2**31


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None, plan: Strips) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for tensors of a GPU."""
    u, dt, B, C = (rows(t) for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
    z = u if inputs.z is None else rows(inputs.z)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = y.new_empty(inputs.batch, inputs.d_inner, inputs.d_state, dtype=torch.float32)
    strip = triton.cdiv(triton.cdiv(inputs.length, plan.strips), plan.tokens) * plan.tokens
    strips_kernel[triton.cdiv(inputs.d_inner, plan.channels), inputs.batch](
        *(x for t in (u, dt, z, B, C) for x in (t, t.stride(0), t.stride(1))),
        inputs.A.float().contiguous(),
        dt if inputs.dt_bias is None else inputs.dt_bias.float().contiguous(),
        *(inputs.D.contiguous(), final if state is None else state.float().contiguous(), y, final),
        *(inputs.length, strip, inputs.d_inner, 0),
        STATES=inputs.d_state,
        STRIPS=plan.strips,
        CHANNELS=plan.channels,
        TOKENS=plan.tokens,
        SOFTPLUS=inputs.dt_bias is not None,
        GATED=inputs.z is not None,
        CONTINUES=state is not None,
        ALIKE=u.stride(1) == dt.stride(1) == inputs.d_inner and B.stride(1) == C.stride(1),
        num_warps=max(1, plan.strips * plan.channels // WARP),
        enable_fp_fusion=True,
        **({"maxnreg": plan.registers} if plan.registers else {}),
    )
    return y, final
