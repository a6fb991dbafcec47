"""Mamba-2's scan on CPU: a numba kernel that walks over time with the states of a channel in SIMD lanes.

The chunked form trades the recurrence for matrix products of about as many operations. On a CPU the recurrence wins: a
stretch of tokens' B and C and the states of two channels stay in L1, each state is read and written once a token, and
there is one exp for a head instead of one for every pair of tokens. Everything is computed in float32.
"""

from __future__ import annotations

import numpy as np
import torch

from .inputs import SsdInputs
from .kernels import F32, LOG2_E, exp2, fast_sum, flat, jit, run, whole

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
def _two(h, other, B, C, decay, drive, other_drive):
    """The same for two channels of a head, which share B and C."""
    total, other_total = F32(0), F32(0)
    for n in range(np.uint64(h.shape[0])):
        value = decay * h[n] + drive * B[n]
        other_value = decay * other[n] + other_drive * B[n]
        h[n] = value
        other[n] = other_value
        total += value * C[n]
        other_total += other_value * C[n]
    return total, other_total


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
            for p in range(0, P, 2):
                for t in range(tokens):
                    step = dt[b * dt_step[0] + (start + t) * dt_step[1] + head]
                    at_B = b * B_step[0] + (start + t) * B_step[1] + at_group
                    at_C = b * C_step[0] + (start + t) * C_step[1] + at_group
                    B_t, C_t = B[at_B : at_B + N], C[at_C : at_C + N]
                    at_u = b * u_step[0] + (start + t) * u_step[1] + head * P + p
                    at_y = ((b * L + start + t) * heads + head) * P + p
                    if p + 1 < P:
                        x, other = u[at_u], u[at_u + 1]
                        read, other_read = _two(states[p], states[p + 1], B_t, C_t, decay[t], step * x, step * other)
                        y[at_y + 1] = other_read + D[head] * other
                    else:
                        x = u[at_u]
                        read = _one(states[p], B_t, C_t, decay[t], step * x)
                    y[at_y] = read + D[head] * x


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
