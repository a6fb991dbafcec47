"""The selective scan on CPU: numba kernels that keep 32 channels in SIMD lanes and walk over time.

Channels are contiguous in u, dt, z and y, and independent of each other, so a block of channels is one task: its
states stay in L1 from the first token to the last. Tokens are staged a tile at a time, because reading one block of one
token touches a new page every step and would wait for memory each time. Everything is computed in float32.

Tasks run on a small thread pool of our own (the kernels release the GIL). numba's threading layers were measured and
left out: workqueue aborts the process when two threads enter it, and the others split the work evenly beforehand, so
that one core busy elsewhere (torch's OpenMP threads spin for milliseconds after each operation) delays the whole scan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

from .inputs import ScanInputs

LANES = np.uint64(32)  # channels per block. Unsigned: numba's negative-index handling would prevent vectorising
TILE = 32  # tokens staged at once
SERIAL_WORK = 2**19  # state updates below which waking a second thread costs more than it saves (about 0.2 ms)

_F = np.float32
_LOG2_E = _F(np.log2(np.e))
_ROUND = _F(1.5 * 2**23)  # adding it to |x| < 2**22 rounds x to an integer, which then stands in the low bits
# 2^f = 1 + f (C1 + ... + C6 f^5) on [-1/2, 1/2], minimax in the relative error (2e-9). The constant is exactly 1, so
# that a slowly decaying state does not drift over thousands of steps.
_C1, _C2, _C3, _C4, _C5, _C6 = (
    _F(c) for c in (0.69314718246, 0.24022647739, 0.055503323674, 0.0096184369177, 0.0013398875017, 0.00015353361960)
)


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, once per machine; without a place for the cache, once per process."""
    # "contract" allows fused multiply-add and keeps NaN and infinities, which full fastmath does not
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba: "no locator available", nowhere to write
        return numba.njit(function, **options)


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(function, inline="always", fastmath={"contract"})


@intrinsic
def _power_of_two(typing_context, x):
    """2^k as float32, k the integer in the low bits of x, by writing k into the exponent; 0 for -127, inf for 128."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], i32)
        exponent = builder.add(builder.shl(bits, ir.Constant(i32, 23)), ir.Constant(i32, 127 << 23))
        return builder.bitcast(exponent, ir.FloatType())

    return numba.float32(numba.float32), generate


@_inline
def _exp2(x):
    """2^x in float32 to 1e-7 relative; 0 below the normal range, inf above, NaN for NaN."""
    x = _F(-127) if x < _F(-127) else x  # written so that NaN passes
    x = _F(128) if x > _F(128) else x
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = ((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1
    return (p * f + _F(1)) * _power_of_two(shifted)


@_inline
def _silu(x):
    return x / (_F(1) + _exp2(-x * _LOG2_E))


def _fast_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a sum whose order may change; only in such a one may it, which vectorises the sum."""
    return numba.njit(function, forceinline=True, fastmath={"contract", "reassoc"})


@_fast_sum
def _dot(x, y):
    """Sum of products in any order."""
    total = _F(0)
    for i in range(np.uint64(x.shape[0])):
        total += x[i] * y[i]
    return total


@_inline
def _load_block(b, d, A, state, width):
    """The states and the decay rates (in powers of two) of one block of channels, (N, LANES) flat, unused lanes 0."""
    N = A.shape[1]
    h, rate = np.zeros(N * LANES, _F), np.zeros(N * LANES, _F)
    for j in range(width):
        for n in range(N):
            h[n * LANES + j] = state[b, d + j, n]
            rate[n * LANES + j] = A[d + j, n] * _LOG2_E
    return h, rate


@_jit
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
    dt_tile, drive, acc = np.zeros(TILE * LANES, _F), np.zeros(TILE * LANES, _F), np.zeros(TILE * LANES, _F)
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
                        value = _exp2(dt_tile[o + j] * rate[i + j]) * h[i + j] + drive[o + j] * B_n
                        h[i + j] = value
                        acc[o + j] += value * C_n
            for t in range(tokens):
                o = np.uint64(t) * LANES
                at_y = np.uint64((b * L + start + t) * channels + d)
                if gated:
                    at_z = np.uint64(b * z_step[0] + (start + t) * z_step[1] + d)
                    for j in range(width):
                        y[at_y + j] = acc[o + j] * _silu(z[at_z + j])
                else:
                    for j in range(width):
                        y[at_y + j] = acc[o + j]
        for j in range(width):
            for n in range(N):
                out[b, np.uint64(d) + j, n] = h[n * LANES + j]


@_jit
def _scan_states_blocks(first, last, size, u, u_step, dt, dt_step, B, B_step, A, state, states):
    """As `_scan_blocks`, but write every state to `states`, (B, L + 1, N, D), instead of reading them out."""
    L, channels = size
    N = A.shape[1]
    per_row = (channels + int(LANES) - 1) // int(LANES)
    flat = states.ravel()
    dt_row, drive = np.zeros(LANES, _F), np.zeros(LANES, _F)
    for block in range(first, last):
        b, d = block // per_row, (block % per_row) * int(LANES)
        width = np.uint64(min(int(LANES), channels - d))
        h, rate = _load_block(b, np.uint64(d), A, state, width)
        for t in range(L + 1):
            at = np.uint64((b * (L + 1) + t) * N * channels + d)
            for n in range(np.uint64(N)):
                for j in range(width):
                    flat[at + n * np.uint64(channels) + j] = h[n * LANES + j]
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
                    h[i + j] = _exp2(dt_row[j] * rate[i + j]) * h[i + j] + drive[j] * B_n


@_jit
def _scan_token(size, u, u_step, dt, dt_step, z, z_step, gated, B, B_step, C, C_step, A, D, state, y, out):
    """One token of every sequence: lanes hold (channel, state) pairs as they lie, so that nothing is transposed.

    What differs by channel is spread over its states first; the long flat loop that follows vectorises for any N.
    """
    batch, channels = size
    N = A.shape[1]
    power, drive = np.empty(int(LANES) * N, _F), np.empty(int(LANES) * N, _F)
    rates, before, after = A.ravel(), state.ravel(), out.ravel()
    for b in range(batch):
        B_b, C_b = B[b * B_step[0] : b * B_step[0] + N], C[b * C_step[0] : b * C_step[0] + N]
        for first in range(0, channels, int(LANES)):
            width = min(int(LANES), channels - first)
            for j in range(width):
                delta = dt[np.uint64(b * dt_step[0] + first + j)]
                step = delta * u[np.uint64(b * u_step[0] + first + j)]
                for n in range(N):
                    power[np.uint64(j * N + n)] = delta * _LOG2_E
                    drive[np.uint64(j * N + n)] = step * B_b[np.uint64(n)]
            at_A, at_h = np.uint64(first * N), np.uint64((b * channels + first) * N)
            for i in range(np.uint64(width * N)):
                after[at_h + i] = _exp2(power[i] * rates[at_A + i]) * before[at_h + i] + drive[i]
            for j in range(width):
                d = first + j
                total = D[np.uint64(d)] * u[np.uint64(b * u_step[0] + d)]
                total += _dot(after[(b * channels + d) * N : (b * channels + d + 1) * N], C_b)
                gate = _silu(z[np.uint64(b * z_step[0] + d)]) if gated else _F(1)
                y[np.uint64(b * channels + d)] = total * gate


def _flat(tensor: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """A (B, L, K) tensor as a flat float32 view and its strides over (batch, token), copied only where it must be."""
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        tensor = tensor.contiguous()
    (batch, length, width), (over_batch, over_tokens, _) = tensor.shape, tensor.stride()
    size = (batch - 1) * over_batch + (length - 1) * over_tokens + width if tensor.numel() else 0
    return tensor.as_strided((size,), (1,)).numpy(), (over_batch, over_tokens)


def _whole(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a contiguous float32 array."""
    return tensor.detach().float().contiguous().numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="ssmc-scan")


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool without its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _blocks(inputs: ScanInputs) -> int:
    """Tasks of a scan: sequences times blocks of channels."""
    return inputs.batch * -(-inputs.d_inner // int(LANES))


def _run(kernel: Callable[..., None], inputs: ScanInputs, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel over `blocks` tasks, on as many threads as torch uses and the work is worth."""
    work = inputs.batch * inputs.length * inputs.d_inner * inputs.d_state
    threads = min(torch.get_num_threads(), blocks) if work >= SERIAL_WORK else 1
    if threads == 1:
        kernel(0, blocks, *arguments)
        return
    share = max(1, blocks // (4 * threads))  # small shares, claimed when free: a delayed thread delays nobody
    claims = iter(range(0, blocks, share))

    def work_off() -> None:
        for first in claims:
            kernel(first, min(first + share, blocks), *arguments)

    helpers = [_pool().submit(work_off) for _ in range(threads - 1)]
    work_off()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun has nothing left to do
            helper.result()


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
    sequences = (*_flat(inputs.u), *_flat(inputs.dt), *_flat(gate), inputs.z is not None)
    return (*sequences, *_flat(inputs.B), *_flat(inputs.C), _whole(inputs.A), _whole(inputs.D))


def _before(inputs: ScanInputs, state: torch.Tensor | None) -> np.ndarray:
    return _whole(inputs.initial_state() if state is None else state)


def _outputs(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the output (B, L, D) and the final state (B, D, N)."""
    state = (inputs.batch, inputs.d_inner, inputs.d_state)
    return torch.empty(inputs.u.shape, dtype=torch.float32), torch.empty(state, dtype=torch.float32)


def _raw(y: torch.Tensor, state: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return y.numpy().reshape(-1), state.numpy()


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None) -> torch.Tensor:
    """All hidden states; as `reference.scan_states`, without gradients, for CPU tensors."""
    states = torch.empty(inputs.batch, inputs.length + 1, inputs.d_state, inputs.d_inner, dtype=torch.float32)
    read = (*_flat(inputs.u), *_flat(inputs.dt), *_flat(inputs.B), _whole(inputs.A), _before(inputs, state))
    arguments = ((inputs.length, inputs.d_inner), *read, states.numpy())
    _run(_scan_states_blocks, inputs, _blocks(inputs), arguments)
    return states
