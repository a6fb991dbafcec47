"""Mamba-2's scan on CPU: a numba kernel that walks over time with the states of a channel in SIMD lanes.

The chunked form trades the recurrence for matrix products of about as many operations. On a CPU the recurrence wins: a
stretch of tokens' B and C and the states of four channels stay in L1, each state is read and written once a token, and
there is one exp for a head instead of one for every pair of tokens. Everything is computed in float32.
"""

from __future__ import annotations

import numpy as np
import torch

from ssmc.runtime.scan.inputs import SsdInputs
from ssmc.runtime.scan.kernels import F32, LOG2_E, exp2, fast_sum, flat, jit, run, whole

TILE = 16  # tokens whose B and C stay in L1 while all channels of a head pass over them


@fast_sum
def _one(h, B, C, decay, drive):
    """Advance the states h (N,) of a channel by a token, in place, and read them out. The sum may take any order."""
    total = F32(0)
    for n in range(np.uint64(h.shape[0])):
        value = decay * h[n] + drive * B[n]
        h[n] = value
        total += value * C[n]
    return total


@fast_sum
def _four(h0, h1, h2, h3, B, C, decay, drive0, drive1, drive2, drive3):
    """The same for four channels of a head, which share B and C: two thirds of the loads, 1.7 times as fast as two."""
    sum0, sum1, sum2, sum3 = F32(0), F32(0), F32(0), F32(0)
    for n in range(np.uint64(h0.shape[0])):
        b, c = B[n], C[n]
        value0, value1 = decay * h0[n] + drive0 * b, decay * h1[n] + drive1 * b
        value2, value3 = decay * h2[n] + drive2 * b, decay * h3[n] + drive3 * b
        h0[n], h1[n], h2[n], h3[n] = value0, value1, value2, value3
        sum0 += value0 * c
        sum1 += value1 * c
        sum2 += value2 * c
        sum3 += value3 * c
    return sum0, sum1, sum2, sum3


@jit
def _scan_heads(first, last, size, u, u_step, dt, dt_step, B, B_step, C, C_step, A, D, y, state):
    """Scan heads first..last-1 of the (batch x heads) grid; `state` (B, H, P, N) is advanced in place.

    u, dt, B, C and y are flat; `*_step` are their strides over (batch, token). size is (L, H, P, G, N).
    """
    L, heads, P, groups, N = size
    decay = np.empty(TILE, F32)
    for block in range(first, last):
        b, head = block // heads, block % heads
        states, rate = state[b, head], A[head] * LOG2_E
        at_group = (head // (heads // groups)) * N
        for start in range(0, L, TILE):
            tokens = min(TILE, L - start)
            for t in range(tokens):
                decay[t] = exp2(dt[b * dt_step[0] + (start + t) * dt_step[1] + head] * rate)
            for p in range(0, P - P % 4, 4):
                for t in range(tokens):
                    step = dt[b * dt_step[0] + (start + t) * dt_step[1] + head]
                    at_B = b * B_step[0] + (start + t) * B_step[1] + at_group
                    at_C = b * C_step[0] + (start + t) * C_step[1] + at_group
                    B_t, C_t = B[at_B : at_B + N], C[at_C : at_C + N]
                    at_u = b * u_step[0] + (start + t) * u_step[1] + head * P + p
                    at_y = ((b * L + start + t) * heads + head) * P + p
                    x0, x1, x2, x3 = u[at_u], u[at_u + 1], u[at_u + 2], u[at_u + 3]
                    h0, h1, h2, h3 = states[p], states[p + 1], states[p + 2], states[p + 3]
                    drive = step * x0, step * x1, step * x2, step * x3
                    read0, read1, read2, read3 = _four(h0, h1, h2, h3, B_t, C_t, decay[t], *drive)
                    y[at_y], y[at_y + 1] = read0 + D[head] * x0, read1 + D[head] * x1
                    y[at_y + 2], y[at_y + 3] = read2 + D[head] * x2, read3 + D[head] * x3
            for p in range(P - P % 4, P):  # what is left over; a branch in the loop above makes that a third slower
                for t in range(tokens):
                    step = dt[b * dt_step[0] + (start + t) * dt_step[1] + head]
                    at_B = b * B_step[0] + (start + t) * B_step[1] + at_group
                    at_C = b * C_step[0] + (start + t) * C_step[1] + at_group
                    x = u[b * u_step[0] + (start + t) * u_step[1] + head * P + p]
                    read = _one(states[p], B[at_B : at_B + N], C[at_C : at_C + N], decay[t], step * x)
                    y[((b * L + start + t) * heads + head) * P + p] = read + D[head] * x


def ssd_scan(inputs: SsdInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `ssd.ssd_scan`, without gradients, for CPU tensors."""
    after = (
        inputs.initial_state() if state is None else state.detach().float().clone(memory_format=torch.contiguous_format)
    )
    y = torch.empty(inputs.u.shape, dtype=torch.float32)
    size = (inputs.length, inputs.heads, inputs.head_dim, inputs.groups, inputs.d_state)
    sequences = (*flat(inputs.u), *flat(inputs.dt), *flat(inputs.B.flatten(2)), *flat(inputs.C.flatten(2)))
    arguments = (size, *sequences, whole(inputs.A), whole(inputs.D), y.numpy().reshape(-1), after.numpy())
    work = inputs.batch * inputs.length * inputs.d_inner * inputs.d_state
    run(_scan_heads, inputs.batch * inputs.heads, work, arguments)
    return y.to(inputs.u.dtype), after
