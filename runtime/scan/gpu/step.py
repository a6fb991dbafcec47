"""Small kernels around the scan, each for what torch does in several: RMS norm, A from A_log, the convolution's window.

A decoding step of one sequence is all small kernels: how many there are is how long it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, channels, eps, BLOCK: tl.constexpr):
    """One row a program; rounded to the dtype of x before the weight, as transformers does."""
    row = tl.program_id(0).to(tl.int64) * channels
    d = tl.arange(0, BLOCK)
    stored = tl.load(x_ptr + row + d, mask=d < channels, other=0.0)
    x = stored.to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / channels + eps)
    weight = tl.load(weight_ptr + d, mask=d < channels, other=0.0).to(tl.float32)
    value = weight * x.to(stored.dtype).to(tl.float32)
    tl.store(out_ptr + row + d, value.to(out_ptr.dtype.element_ty), mask=d < channels)


@triton.jit
def rates_kernel(a_log_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """A = -e^A_log, elementwise."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = -tl.exp(tl.load(a_log_ptr + at, mask=at < count, other=0.0).to(tl.float32))
    tl.store(out_ptr + at, value, mask=at < count)


@triton.jit
def shift_kernel(window_ptr, x_ptr, x_batch, channels, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Drop the oldest of WIDTH inputs of every channel and append x; each lane has channels of its own."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    at = window_ptr + (row * channels + d) * WIDTH
    for k in tl.static_range(WIDTH - 1):
        tl.store(at + k, tl.load(at + k + 1, mask=d < channels, other=0.0), mask=d < channels)
    x = tl.load(x_ptr + row * x_batch + d, mask=d < channels, other=0.0)
    tl.store(at + WIDTH - 1, x.to(window_ptr.dtype.element_ty), mask=d < channels)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last axis, in what the dtypes of both promote to.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    if out.numel():
        block = triton.next_power_of_2(x.shape[-1])
        with torch.cuda.device_of(x):
            rms_norm_kernel[(x.numel() // x.shape[-1],)](
                *(x, weight.contiguous(), out, x.shape[-1], float(eps)),
                BLOCK=block,
                num_warps=min(8, max(1, block // 256)),
            )
    return out


def decay_rates(a_log: torch.Tensor) -> torch.Tensor:
    """A = -exp(A_log) in float32, of any shape."""
    a_log = a_log.detach().contiguous()
    out = torch.empty(a_log.shape, dtype=torch.float32, device=a_log.device)
    with torch.cuda.device_of(a_log):
        rates_kernel[(triton.cdiv(out.numel(), BLOCK),)](a_log, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def shift_window(window: torch.Tensor, x: torch.Tensor) -> None:
    """Move the convolution's window on by one token, in place.

    Args:
        window: (B, D, K) contiguous, the last K inputs of every channel; the oldest goes.
        x: (B, 1, D) the newest, channels together.
    """
    batch, channels, width = window.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(window):
        shift_kernel[triton.cdiv(channels, BLOCK), batch](
            window, x, x.stride(0), channels, WIDTH=width, BLOCK=BLOCK, num_warps=4
        )
