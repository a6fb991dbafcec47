"""The selective scan on CPU: numba kernels that keep 32 channels in SIMD lanes and walk over time.

Channels are contiguous in u, dt, z and y, and independent of each other, so a block of channels is one task: its
states stay in L1 from the first token to the last. Tokens are staged a tile at a time, because reading one block of one
token touches a new page every step and would wait for memory each time. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssmc.runtime.scan.inputs import ScanInputs
from ssmc.runtime.scan.kernels import F32, LOG2_E, dot, exp2, flat, inline, jit, run, silu, whole

LANES = np.uint64(32)  # channels per block. Unsigned: numba's negative-index handling would prevent vectorising
TILE = 32  # tokens staged at once


@inline
def _load_block(b, d, A, state, width):
    """The states and the decay rates (in powers of two) of one block of channels, (N, LANES) flat, unused lanes 0."""
    N = A.shape[1]
    h, rate = np.zeros(N * LANES, F32), np.zeros(N * LANES, F32)
    for j in range(width):
        for n in range(N):
            h[n * LANES + j] = state[b, d + j, n]
            rate[n * LANES + j] = A[d + j, n] * LOG2_E
    return h, rate


@jit
def _scan_blocks(
    first, last, size, u, u_step, dt, dt_step, z, z_step, gated, B, B_step, C, C_step, A, D, state, y, out, kept, keep
):
    """Scan blocks first..last-1 of the (batch x channel blocks) grid.

    u, dt, z, B, C and y are flat; `*_step` are their strides over (batch, token). size is (L, D). With `keep`, the
    states before each tile go to `kept`, (blocks, tiles, N LANES): a backward pass recomputes the others from them.
    """
    L, channels = size
    N = A.shape[1]
    per_row = (channels + int(LANES) - 1) // int(LANES)
    dt_tile, drive, acc = np.zeros(TILE * LANES, F32), np.zeros(TILE * LANES, F32), np.zeros(TILE * LANES, F32)
    for block in range(first, last):
        b, d = block // per_row, (block % per_row) * int(LANES)
        width = np.uint64(min(int(LANES), channels - d))
        h, rate = _load_block(b, np.uint64(d), A, state, width)
        for start in range(0, L, TILE):
            tokens = min(TILE, L - start)
            if keep:
                kept[block, start // TILE] = h
            for t in range(tokens):
                o = np.uint64(t) * LANES
                at_u = np.uint64(b * u_step[0] + (start + t) * u_step[1] + d)
                at_dt = np.uint64(b * dt_step[0] + (start + t) * dt_step[1] + d)
                for j in range(width):
                    dt_tile[o + j] = dt[at_dt + j]
                    drive[o + j] = dt[at_dt + j] * u[at_u + j]
                    acc[o + j] = D[np.uint64(d) + j] * u[at_u + j]
            for t in range(tokens):
                o = np.uint64(t) * LANES
                at_B = np.uint64(b * B_step[0] + (start + t) * B_step[1])
                at_C = np.uint64(b * C_step[0] + (start + t) * C_step[1])
                for n in range(np.uint64(N)):
                    i, B_n, C_n = n * LANES, B[at_B + n], C[at_C + n]
                    for j in range(LANES):
                        value = exp2(dt_tile[o + j] * rate[i + j]) * h[i + j] + drive[o + j] * B_n
                        h[i + j] = value
                        acc[o + j] += value * C_n
            for t in range(tokens):
                o = np.uint64(t) * LANES
                at_y = np.uint64((b * L + start + t) * channels + d)
                if gated:
                    at_z = np.uint64(b * z_step[0] + (start + t) * z_step[1] + d)
                    for j in range(width):
                        y[at_y + j] = acc[o + j] * silu(z[at_z + j])
                else:
                    for j in range(width):
                        y[at_y + j] = acc[o + j]
        for j in range(width):
            for n in range(N):
                out[b, np.uint64(d) + j, n] = h[n * LANES + j]


@jit
def _scan_states_blocks(first, last, size, u, u_step, dt, dt_step, B, B_step, A, state, states):
    """As `_scan_blocks`, but write every state to `states`, (B, L + 1, N, D), instead of reading them out."""
    L, channels = size
    N = A.shape[1]
    per_row = (channels + int(LANES) - 1) // int(LANES)
    memory = states.ravel()
    dt_row, drive = np.zeros(LANES, F32), np.zeros(LANES, F32)
    for block in range(first, last):
        b, d = block // per_row, (block % per_row) * int(LANES)
        width = np.uint64(min(int(LANES), channels - d))
        h, rate = _load_block(b, np.uint64(d), A, state, width)
        for t in range(L + 1):
            at = np.uint64((b * (L + 1) + t) * N * channels + d)
            for n in range(np.uint64(N)):
                for j in range(width):
                    memory[at + n * np.uint64(channels) + j] = h[n * LANES + j]
            if t == L:
                break
            at_u = np.uint64(b * u_step[0] + t * u_step[1] + d)
            at_dt = np.uint64(b * dt_step[0] + t * dt_step[1] + d)
            at_B = np.uint64(b * B_step[0] + t * B_step[1])
            for j in range(width):
                dt_row[j] = dt[at_dt + j]
                drive[j] = dt[at_dt + j] * u[at_u + j]
            for n in range(np.uint64(N)):
                i, B_n = n * LANES, B[at_B + n]
                for j in range(LANES):
                    h[i + j] = exp2(dt_row[j] * rate[i + j]) * h[i + j] + drive[j] * B_n


@jit
def _scan_token(size, u, u_step, dt, dt_step, z, z_step, gated, B, B_step, C, C_step, A, D, state, y, out):
    """One token of every sequence: lanes hold (channel, state) pairs as they lie, so that nothing is transposed.

    What differs by channel is spread over its states first; the long flat loop that follows vectorises for any N.
    """
    batch, channels = size
    N = A.shape[1]
    power, drive = np.empty(int(LANES) * N, F32), np.empty(int(LANES) * N, F32)
    rates, before, after = A.ravel(), state.ravel(), out.ravel()
    for b in range(batch):
        B_b, C_b = B[b * B_step[0] : b * B_step[0] + N], C[b * C_step[0] : b * C_step[0] + N]
        for first in range(0, channels, int(LANES)):
            width = min(int(LANES), channels - first)
            for j in range(width):
                delta = dt[np.uint64(b * dt_step[0] + first + j)]
                step = delta * u[np.uint64(b * u_step[0] + first + j)]
                for n in range(N):
                    power[np.uint64(j * N + n)] = delta * LOG2_E
                    drive[np.uint64(j * N + n)] = step * B_b[np.uint64(n)]
            at_A, at_h = np.uint64(first * N), np.uint64((b * channels + first) * N)
            for i in range(np.uint64(width * N)):
                after[at_h + i] = exp2(power[i] * rates[at_A + i]) * before[at_h + i] + drive[i]
            for j in range(width):
                d = first + j
                total = D[np.uint64(d)] * u[np.uint64(b * u_step[0] + d)]
                total += dot(after[(b * channels + d) * N : (b * channels + d + 1) * N], C_b)
                gate = silu(z[np.uint64(b * z_step[0] + d)]) if gated else F32(1)
                y[np.uint64(b * channels + d)] = total * gate


def _blocks(inputs: ScanInputs) -> int:
    """Tasks of a scan: sequences times blocks of channels."""
    return inputs.batch * -(-inputs.d_inner // int(LANES))


def _run(kernel: Callable[..., None], inputs: ScanInputs, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel over `blocks` tasks of a scan."""
    run(kernel, blocks, inputs.batch * inputs.length * inputs.d_inner * inputs.d_state, arguments)


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for CPU tensors."""
    if inputs.length != 1:
        return _scan(inputs, state, keep=False)[:2]
    y, after = _outputs(inputs)
    _scan_token((inputs.batch, inputs.d_inner), *_arguments(inputs), _before(inputs, state), *_raw(y, after))
    return y.to(inputs.u.dtype), after


def _scan(
    inputs: ScanInputs, state: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, final state, and with `keep` the states before each tile of tokens, (blocks, tiles, N LANES)."""
    y, after = _outputs(inputs)
    tiles = -(-inputs.length // TILE) if keep else 0
    kept = torch.empty(_blocks(inputs), tiles, inputs.d_state * int(LANES))
    arguments = (*_arguments(inputs), _before(inputs, state), *_raw(y, after), kept.numpy(), keep)
    _run(_scan_blocks, inputs, _blocks(inputs), ((inputs.length, inputs.d_inner), *arguments))
    return y.to(inputs.u.dtype), after, kept


def _arguments(inputs: ScanInputs) -> tuple[Any, ...]:
    """What the kernels read, in their order."""
    gate = inputs.u if inputs.z is None else inputs.z
    sequences = (*flat(inputs.u), *flat(inputs.dt), *flat(gate), inputs.z is not None)
    return (*sequences, *flat(inputs.B), *flat(inputs.C), whole(inputs.A), whole(inputs.D))


def _before(inputs: ScanInputs, state: torch.Tensor | None) -> np.ndarray:
    return whole(inputs.initial_state() if state is None else state)


def _outputs(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the output (B, L, D) and the final state (B, D, N)."""
    state = (inputs.batch, inputs.d_inner, inputs.d_state)
    return torch.empty(inputs.u.shape, dtype=torch.float32), torch.empty(state, dtype=torch.float32)


def _raw(y: torch.Tensor, state: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return y.numpy().reshape(-1), state.numpy()


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None) -> torch.Tensor:
    """All hidden states; as `reference.scan_states`, without gradients, for CPU tensors."""
    states = torch.empty(inputs.batch, inputs.length + 1, inputs.d_state, inputs.d_inner, dtype=torch.float32)
    read = (*flat(inputs.u), *flat(inputs.dt), *flat(inputs.B), whole(inputs.A), _before(inputs, state))
    arguments = ((inputs.length, inputs.d_inner), *read, states.numpy())
    _run(_scan_states_blocks, inputs, _blocks(inputs), arguments)
    return states
