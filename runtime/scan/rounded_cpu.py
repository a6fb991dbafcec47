"""The scan with its state rounded after every token, on a CPU: one kernel for both generations of Mamba."""

from __future__ import annotations

import numba
import numpy as np
import torch

from ssmc.runtime.scan.inputs import ScanInputs, SsdInputs
from ssmc.runtime.scan.kernels import F32, LOG2_E, exp2, jit, run, silu, whole
from ssmc.runtime.scan.rounding import DITHER, LEVELS, StateFormat, channel_block

_LEVELS, _DITHER, _EACH = F32(LEVELS), F32(DITHER), F32(1 / LEVELS)
_PER = {"state": 0, "channel": 1, "head": 2}


@numba.njit(forceinline=True)  # not contracted, so that codes are those of `rounding.codes_of`
def _code(value, scale, dithered):
    if scale <= F32(0):
        return F32(0)
    x = value / scale
    if dithered:
        low = x * _DITHER
        x = np.floor(x + (low - np.floor(low)))
    else:
        x = np.rint(x)
    return min(max(x, -_LEVELS), _LEVELS)


@numba.njit(forceinline=True)
def _half(value):
    """The nearest float16: 11 of 24 bits by Veltkamp's splitting; below the normal range, whole steps of 2^-24."""
    value = min(max(value, F32(-65504)), F32(65504))
    if abs(value) < F32(2.0**-14):
        return np.rint(value * F32(2.0**24)) * F32(2.0**-24)
    split = value * F32(8193)
    return split - (split - value)


@numba.njit(forceinline=True)
def _round_block(h, largest, per, half, dithered):
    """Round the states h (P, N) of a head in place."""
    P, N = h.shape
    if half:
        for p in range(P):
            for n in range(N):
                h[p, n] = _half(h[p, n])
        return
    if per != 1:
        for n in range(N):
            largest[n] = F32(0)
        for p in range(P):
            for n in range(N):
                largest[n] = max(largest[n], abs(h[p, n]))
        if per == 2:
            most = F32(0)
            for n in range(N):
                most = max(most, largest[n])
            for n in range(N):
                largest[n] = most
        for n in range(N):
            largest[n] = _half(largest[n] * _EACH)
        for p in range(P):
            for n in range(N):
                h[p, n] = _code(h[p, n], largest[n], dithered) * largest[n]
        return
    for p in range(P):
        most = F32(0)
        for n in range(N):
            most = max(most, abs(h[p, n]))
        scale = _half(most * _EACH)
        for n in range(N):
            h[p, n] = _code(h[p, n], scale, dithered) * scale


@jit
def _scan_heads(first, last, size, form, u, dt, A, B, C, D, z, gated, y, state):
    """Scan heads first..last-1 of the (batch x heads) grid; `state` (B, H, P, N) is advanced in place.

    u, z and y are (B, L, H, P), dt (B, L, H, P or 1), A (H, P or 1, N or 1), B and C (B, L, G, N), D (H, P or 1).
    """
    L, heads, per_group, wide = size
    per, half, dithered = form
    P, N = state.shape[2:]
    largest, decay = np.empty(N, F32), np.empty(N, F32)
    for block in range(first, last):
        b, head = block // heads, block % heads
        h, group = state[b, head], head // per_group
        for t in range(L):
            if t:
                _round_block(h, largest, per, half, dithered)
            B_t, C_t = B[b, t, group], C[b, t, group]
            shared = exp2(dt[b, t, head, 0] * A[head, 0, 0] * LOG2_E)
            for p in range(P):
                step = dt[b, t, head, p if wide else 0]
                if wide:
                    for n in range(N):
                        decay[n] = exp2(step * A[head, p, n] * LOG2_E)
                x = u[b, t, head, p]
                drive, total = step * x, D[head, p if wide else 0] * x
                for n in range(N):
                    value = (decay[n] if wide else shared) * h[p, n] + drive * B_t[n]
                    h[p, n] = value
                    total += value * C_t[n]
                y[b, t, head, p] = total * silu(z[b, t, head, p]) if gated else total


def rounded_scan(
    inputs: ScanInputs | SsdInputs, state: torch.Tensor | None, form: StateFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rounded.rounded_scan`, for CPU tensors, without gradients."""
    after = inputs.initial_state() if state is None else state.detach().float()
    shape, wide = after.shape, isinstance(inputs, ScanInputs)
    heads = inputs.d_inner // channel_block(inputs.d_inner) if isinstance(inputs, ScanInputs) else inputs.heads
    P, groups = inputs.d_inner // heads, 1 if isinstance(inputs, ScanInputs) else inputs.groups
    split = (heads, P)
    u = inputs.u.unflatten(2, split)
    z = u if inputs.z is None else inputs.z.unflatten(2, split)
    dt = inputs.dt.unflatten(2, split if wide else (heads, 1))
    A = inputs.A.unflatten(0, split) if wide else inputs.A[:, None, None]
    skip = inputs.D.unflatten(0, split) if wide else inputs.D[:, None]
    B, C = (x.unflatten(2, (groups, -1)) if wide else x for x in (inputs.B, inputs.C))
    y = torch.empty(u.shape, dtype=torch.float32)
    after = after.clone(memory_format=torch.contiguous_format).view(inputs.batch, heads, P, inputs.d_state)
    gated = wide and inputs.z is not None
    size = (inputs.length, heads, heads // groups, wide)
    how = (_PER[form.per], form.dtype == "float16", form.dithered)
    arguments = (size, how, *map(whole, (u, dt, A, B, C, skip, z)), gated, y.numpy(), after.numpy())
    work = inputs.batch * inputs.length * inputs.d_inner * inputs.d_state
    run(_scan_heads, inputs.batch * heads, work, arguments)
    return y.flatten(2).to(inputs.u.dtype), after.view(shape)
