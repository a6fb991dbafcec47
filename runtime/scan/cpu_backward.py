"""Gradients of the selective scan on CPU: numba kernels in the layout of `cpu.py`, as a torch.autograd.Function.

The forward pass keeps the states before each tile of tokens only; the backward pass walks over the tiles from the last
to the first, recomputes the states of one tile into a buffer that fits the cache, and then steps backwards through it.
With h_t = a_t h_{t-1} + w_t B_t, a_t = exp(dt_t A), w_t = dt_t u_t, o_t = h_t C_t + D u_t and y_t = o_t silu(z_t), and
g_t standing for the gradient of h_t, the chain rule gives per token

    g_t = dy_t silu(z_t) C_t + a_{t+1} g_{t+1}        dC_t = sum_d dy_t silu(z_t) h_t     dB_t = sum_d g_t w_t
    d(dt_t A) = g_t a_t h_{t-1}                       dw_t = sum_n g_t B_t                dz_t = dy_t o_t silu'(z_t)

Gradients of B and C are sums over channels: each group of channel blocks adds up its own, and the groups are added in
a fixed order, so the result has the same bits whatever the threads do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ssmc.runtime.scan.cpu import LANES, TILE, _arguments, _load_block, _run, _scan
from ssmc.runtime.scan.inputs import ScanInputs
from ssmc.runtime.scan.kernels import F32, LOG2_E, exp2, fast_sum, inline, jit, whole

GROUP = 4  # blocks of channels that add to the same sums of dB and dC

_LN_2 = F32(np.log(2.0))


@fast_sum
def _lane_dot(x, at_x, y, at_y):
    """Sum over the lanes of x[at_x:] * y[at_y:]."""
    total = F32(0)
    for j in range(LANES):
        total += x[at_x + j] * y[at_y + j]
    return total


@inline
def _stage(tokens, width, at, step, source, tile):
    """Copy one block of `tokens` tokens of a flat sequence to a tile."""
    for t in range(tokens):
        o, here = np.uint64(t) * LANES, np.uint64(at + t * step)
        for j in range(width):
            tile[o + j] = source[here + j]


@inline
def _replay(tokens, N, dt, drive, at_B, B, step_B, rate, decay, states):
    """Recompute a tile: a_t into decay and h_t into states, whose entry 0 is there already."""
    for t in range(tokens):
        o, s, B_t = np.uint64(t) * LANES, np.uint64(t * N) * LANES, np.uint64(at_B + t * step_B)
        for n in range(np.uint64(N)):
            i, B_n = s + n * LANES, B[B_t + n]
            after = i + np.uint64(N) * LANES
            for j in range(LANES):
                decay[i + j] = exp2(dt[o + j] * rate[n * LANES + j])
            for j in range(LANES):
                states[after + j] = decay[i + j] * states[i + j] + drive[o + j] * B_n


@inline
def _read_out(tokens, N, u, skip, at_C, C, step_C, states, out):
    """Recompute o_t, what is gated."""
    for t in range(tokens):
        o, s, C_t = np.uint64(t) * LANES, np.uint64((t + 1) * N) * LANES, np.uint64(at_C + t * step_C)
        for j in range(LANES):
            out[o + j] = skip[j] * u[o + j]
        for n in range(np.uint64(N)):
            i, C_n = s + n * LANES, C[C_t + n]
            for j in range(LANES):
                out[o + j] += states[i + j] * C_n


@inline
def _gate(tokens, width, at, step, z, at_dz, channels, dz, out, dy):
    """Write dz and turn the gradient of the gated output, dy, into that of the output before the gate."""
    for t in range(tokens):
        o, here, there = np.uint64(t) * LANES, np.uint64(at + t * step), np.uint64(at_dz + t * channels)
        for j in range(width):
            gate = z[here + j]
            open_ = F32(1) / (F32(1) + exp2(-gate * LOG2_E))
            dz[there + j] = dy[o + j] * out[o + j] * open_ * (F32(1) + gate * (F32(1) - open_))
            dy[o + j] *= gate * open_


@inline
def _step_back(
    tokens, N, width, start, at, channels, at_B, B, step_B, at_C, C, step_C, dt, u, drive, dy, skip, rate, decay,
    states, grad, d_drive, d_power, d_rate, d_skip, du, ddt, dB, dC,
):  # fmt: skip
    """Walk a tile from its last token to its first; grad holds the gradient of the state behind the tile, then before.

    Few arrays in each loop: LLVM checks at run time that what is written overlaps nothing else, and vectorises no loop
    that needs more than eight such checks.
    """
    for t in range(tokens - 1, -1, -1):
        o, s, here = np.uint64(t) * LANES, np.uint64(t * N) * LANES, np.uint64(at + t * channels)
        B_t, C_t = np.uint64(at_B + t * step_B), np.uint64(at_C + t * step_C)
        after = s + np.uint64(N * int(LANES))
        d_drive[:], d_power[:] = F32(0), F32(0)
        for n in range(np.uint64(N)):
            i, B_n, C_n = n * LANES, B[B_t + n], C[C_t + n]
            dC[start + t, n] += _lane_dot(states, after + i, dy, o)
            for j in range(LANES):
                grad[i + j] += dy[o + j] * C_n
                d_drive[j] += grad[i + j] * B_n
            dB[start + t, n] += _lane_dot(grad, i, drive, o)
            for j in range(LANES):
                grad[i + j] *= decay[s + i + j]
                d_rate[i + j] += grad[i + j] * states[s + i + j] * dt[o + j]
            for j in range(LANES):
                d_power[j] += grad[i + j] * states[s + i + j] * rate[i + j]
        for j in range(width):
            du[here + j] = d_drive[j] * dt[o + j] + dy[o + j] * skip[j]
        for j in range(width):
            ddt[here + j] = d_drive[j] * u[o + j] + d_power[j] * _LN_2
        for j in range(LANES):
            d_skip[j] += dy[o + j] * u[o + j]


@jit
def _backward_groups(
    first, last, size, u, u_step, dt, dt_step, z, z_step, gated, B, B_step, C, C_step, A, D,
    kept, dy, d_last, du, ddt, dz, dB, dC, dA, dD, d_first,
):  # fmt: skip
    """Gradients of groups first..last-1 of the (batch x channel groups) grid.

    Reads what `_scan_blocks` reads, the states it kept, and the gradients dy (flat, contiguous) and d_last (B, D, N) of
    its outputs. Writes du, ddt, dz (flat); dB, dC (groups of a sequence, B, L, N); dA, d_first (B, D, N); dD (B, D).
    """
    L, channels = size
    N = A.shape[1]
    rows, block_states = TILE * int(LANES), N * int(LANES)
    per_row = (channels + int(LANES) - 1) // int(LANES)
    groups = (per_row + GROUP - 1) // GROUP
    decay, states, out = (
        np.zeros(TILE * block_states, F32),
        np.zeros((TILE + 1) * block_states, F32),
        np.zeros(rows, F32),
    )
    d_drive, d_power = np.zeros(LANES, F32), np.zeros(LANES, F32)
    for group in range(first, last):
        b, g = group // groups, group % groups
        dB[g, b], dC[g, b] = F32(0), F32(0)
        for position in range(g * GROUP, min(per_row, (g + 1) * GROUP)):
            d, block = position * int(LANES), b * per_row + position
            width = np.uint64(min(int(LANES), channels - d))
            # zero in the lanes without a channel, so that they add nothing to dB and dC
            dt_tile, u_tile, dy_tile, drive = (
                np.zeros(rows, F32), np.zeros(rows, F32), np.zeros(rows, F32), np.zeros(rows, F32),
            )  # fmt: skip
            skip, d_skip, d_rate = np.zeros(LANES, F32), np.zeros(LANES, F32), np.zeros(block_states, F32)
            grad, rate = _load_block(b, np.uint64(d), A, d_last, width)
            for j in range(width):
                skip[j] = D[np.uint64(d) + j]
            for tile in range(kept.shape[1] - 1, -1, -1):
                start = tile * TILE
                tokens, at = min(TILE, L - start), (b * L + start) * channels + d
                _stage(tokens, width, b * u_step[0] + start * u_step[1] + d, u_step[1], u, u_tile)
                _stage(tokens, width, b * dt_step[0] + start * dt_step[1] + d, dt_step[1], dt, dt_tile)
                _stage(tokens, width, at, channels, dy, dy_tile)
                for i in range(np.uint64(rows)):
                    drive[i] = dt_tile[i] * u_tile[i]
                states[:block_states] = kept[block, tile]
                at_B, at_C = b * B_step[0] + start * B_step[1], b * C_step[0] + start * C_step[1]
                _replay(tokens, N, dt_tile, drive, at_B, B, B_step[1], rate, decay, states)
                if gated:
                    at_z = b * z_step[0] + start * z_step[1] + d
                    _read_out(tokens, N, u_tile, skip, at_C, C, C_step[1], states, out)
                    _gate(tokens, width, at_z, z_step[1], z, at, channels, dz, out, dy_tile)
                _step_back(
                    tokens, N, width, start, at, channels, at_B, B, B_step[1], at_C, C, C_step[1], dt_tile, u_tile,
                    drive, dy_tile, skip, rate, decay, states, grad, d_drive, d_power, d_rate, d_skip, du, ddt,
                    dB[g, b], dC[g, b],
                )  # fmt: skip
            for j in range(width):
                dD[b, np.uint64(d) + j] = d_skip[j]
                for n in range(N):
                    dA[b, np.uint64(d) + j, n] = d_rate[n * LANES + j]
                    d_first[b, np.uint64(d) + j, n] = grad[n * LANES + j]


class _SelectiveScan(torch.autograd.Function):
    """`cpu.selective_scan` with gradients for everything it reads."""

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the scan; `tensors` are the fields of `ScanInputs` in their order."""
        y, after, kept = _scan(ScanInputs(*tensors), state, keep=True)
        ctx.save_for_backward(state, kept, *tensors)
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, d_last: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the state and of every field, each in the dtype of what it belongs to."""
        state, kept, *tensors = ctx.saved_tensors
        gradients = _gradients(ScanInputs(*tensors), state, kept, dy, d_last)
        return tuple(
            None if tensor is None else gradient.to(tensor.dtype)
            for tensor, gradient in zip((state, *tensors), gradients, strict=True)
        )


def _gradients(
    inputs: ScanInputs, state: torch.Tensor, kept: torch.Tensor, dy: torch.Tensor | None, d_last: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Gradients of state, u, dt, A, B, C, D and z, float32."""
    dy = torch.zeros(inputs.u.shape) if dy is None else dy
    d_last = torch.zeros(state.shape) if d_last is None else d_last
    groups = -(-inputs.d_inner // (int(LANES) * GROUP))
    shape, readers = inputs.u.shape, (groups, *inputs.B.shape)
    du, ddt, dz = (torch.empty(shape) for _ in range(3))
    dB, dC = torch.empty(readers), torch.empty(readers)
    dA, d_first, dD = torch.empty(state.shape), torch.empty(state.shape), torch.empty(inputs.batch, inputs.d_inner)
    read = (*_arguments(inputs), kept.numpy(), whole(dy).reshape(-1), whole(d_last))
    written = (*(t.numpy().reshape(-1) for t in (du, ddt, dz)), *(t.numpy() for t in (dB, dC, dA, dD, d_first)))
    size = (inputs.length, inputs.d_inner)
    _run(_backward_groups, inputs, inputs.batch * groups, (size, *read, *written))
    return d_first, du, ddt, *(_ordered_sum(part) for part in (dA, dB, dC, dD)), dz


def _ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, one after the other: torch's own sum may split it by the number of threads."""
    total = torch.zeros(parts.shape[1:])
    for part in parts:
        total += part
    return total


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, with first derivatives, for CPU tensors."""
    state = inputs.initial_state() if state is None else state
    return _SelectiveScan.apply(state, inputs.u, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z)
