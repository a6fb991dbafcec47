"""What the numba kernels of both generations of Mamba share: compiling, exp, raw views of tensors, a thread pool.

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

SERIAL_WORK = 2**19  # state updates below which waking a second thread costs more than it saves (about 0.2 ms)

F32 = np.float32
LOG2_E = F32(np.log2(np.e))
_ROUND = F32(1.5 * 2**23)  # adding it to |x| < 2**22 rounds x to an integer, which then stands in the low bits
# 2^f = 1 + f (C1 + ... + C6 f^5) on [-1/2, 1/2], minimax in the relative error (2e-9). The constant is exactly 1, so
# that a slowly decaying state does not drift over thousands of steps.
_C1, _C2, _C3, _C4, _C5, _C6 = (
    F32(c) for c in (0.69314718246, 0.24022647739, 0.055503323674, 0.0096184369177, 0.0013398875017, 0.00015353361960)
)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, once per machine; without a place for the cache, once per process."""
    # "contract" allows fused multiply-add and keeps NaN and infinities, which full fastmath does not
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba: "no locator available", nowhere to write
        return numba.njit(function, **options)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into whatever calls it."""
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


@inline
def exp2(x):
    """2^x in float32 to 1e-7 relative; 0 below the normal range, inf above, NaN for NaN."""
    x = F32(-127) if x < F32(-127) else x  # written so that NaN passes
    x = F32(128) if x > F32(128) else x
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = ((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1
    return (p * f + F32(1)) * _power_of_two(shifted)


@inline
def silu(x):
    """x / (1 + exp(-x)) in float32."""
    return x / (F32(1) + exp2(-x * LOG2_E))


def fast_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a sum whose order may change; only in such a one may it, which vectorises the sum."""
    return numba.njit(function, forceinline=True, fastmath={"contract", "reassoc"})


@fast_sum
def dot(x, y):
    """Sum of products in any order."""
    total = F32(0)
    for i in range(np.uint64(x.shape[0])):
        total += x[i] * y[i]
    return total


def flat(tensor: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """A (B, L, K) tensor as a flat float32 view and its strides over (batch, token), copied only where it must be."""
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        tensor = tensor.contiguous()
    (batch, length, width), (over_batch, over_tokens, _) = tensor.shape, tensor.stride()
    size = (batch - 1) * over_batch + (length - 1) * over_tokens + width if tensor.numel() else 0
    return tensor.as_strided((size,), (1,)).numpy(), (over_batch, over_tokens)


def whole(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a contiguous float32 array."""
    return tensor.detach().float().contiguous().numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="ssmc-scan")


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool without its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run(kernel: Callable[..., None], blocks: int, work: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel over `blocks` tasks, on as many threads as torch uses and the work is worth.

    Args:
        kernel: takes the first task, the end, and `arguments`.
        blocks: how many tasks there are.
        work: state updates in all of them.
        arguments: of the kernel.
    """
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
