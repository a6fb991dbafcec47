"""Small kernels around the scan, each for what torch does in several: RMS norms, A from A_log, one more input of the
convolution.

A decoding step of one sequence is all small kernels: how many there are is how long it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.kernels import silu

BLOCK = 256


@triton.jit
def rms_norm_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    channels,
    eps,
    ADDED: tl.constexpr,
    AS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program; rounded to the dtype of what is read before the weight, as transformers does.

    If ADDED, the norm is that of `total` = x + `added`, which is written too; if AS_WEIGHT, it reads that in the
    weight's dtype.
    """
    row = tl.program_id(0).to(tl.int64) * channels
    d = tl.arange(0, BLOCK)
    stored = tl.load(x_ptr + row + d, mask=d < channels, other=0.0)
    if ADDED:
        added = tl.load(added_ptr + row + d, mask=d < channels, other=0.0).to(tl.float32)
        stored = (stored.to(tl.float32) + added).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + d, stored, mask=d < channels)
    if AS_WEIGHT:
        stored = stored.to(weight_ptr.dtype.element_ty)
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
def conv_token_kernel(
    window_ptr,
    x_ptr,
    x_batch,
    weight_ptr,
    bias_ptr,
    u_ptr,
    channels,
    WIDTH: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of `kernels.conv_kernel`, and the window of the last WIDTH inputs moved on by it.

    Grid (blocks of channels, sequences). Each lane has channels of its own, so that it overwrites what it alone reads.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    here = d < channels
    at = window_ptr + (row * channels + d) * WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    if BIASED:
        total += tl.load(bias_ptr + d, mask=here, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        earlier = tl.load(at + k + 1, mask=here, other=0.0)
        tl.store(at + k, earlier, mask=here)
        total += tl.load(weight_ptr + d * WIDTH + k, mask=here, other=0.0).to(tl.float32) * earlier.to(tl.float32)
    x = tl.load(x_ptr + row * x_batch + d, mask=here, other=0.0)
    tl.store(at + WIDTH - 1, x.to(window_ptr.dtype.element_ty), mask=here)
    total += tl.load(weight_ptr + d * WIDTH + WIDTH - 1, mask=here, other=0.0).to(tl.float32) * x.to(tl.float32)
    tl.store(u_ptr + row * channels + d, silu(total).to(u_ptr.dtype.element_ty), mask=here)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last axis, in what the dtypes of both promote to.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    _norm(x, None, weight, eps, x, False, out)
    return out


def add_and_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, as_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added and its norm, as `rms_norm` and a sum before it compute them.

    Args:
        x: (..., D).
        added: (..., D).
        weight: (D,).
        eps: added to the mean square.
        dtype: of the sum.
        as_weight: whether the norm reads the sum in the weight's dtype.
    """
    x, added = x.contiguous(), added.contiguous()
    total = torch.empty(x.shape, dtype=dtype, device=x.device)
    read = weight.dtype if as_weight else dtype
    out = torch.empty(x.shape, dtype=torch.promote_types(read, weight.dtype), device=x.device)
    _norm(x, added, weight, eps, total, as_weight, out)
    return total, out


def _norm(
    x: torch.Tensor,
    added: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    as_weight: bool,
    out: torch.Tensor,
) -> None:
    """Launch `rms_norm_kernel`, for the sum if there is something to add."""
    if not out.numel():
        return
    block = triton.next_power_of_2(x.shape[-1])
    with torch.cuda.device_of(x):
        rms_norm_kernel[(x.numel() // x.shape[-1],)](
            *(x, x if added is None else added, weight.contiguous(), total, out, x.shape[-1], float(eps)),
            ADDED=added is not None,
            AS_WEIGHT=as_weight,
            BLOCK=block,
            num_warps=min(8, max(1, block // 256)),
        )


def decay_rates(a_log: torch.Tensor) -> torch.Tensor:
    """A = -exp(A_log) in float32, of any shape."""
    a_log = a_log.detach().contiguous()
    out = torch.empty(a_log.shape, dtype=torch.float32, device=a_log.device)
    with torch.cuda.device_of(a_log):
        rates_kernel[(triton.cdiv(out.numel(), BLOCK),)](a_log, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def conv_token(x: torch.Tensor, window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`conv.causal_conv_silu` of one more input x behind a window, which moves on by it, in place.

    Args:
        x: (B, 1, D) the newest input, channels together.
        window: (B, D, K) contiguous, the last K inputs of every channel; the oldest goes.
        weight: (D, 1, K).
        bias: (D,) or None.

    Returns:
        (B, 1, D) contiguous, in the dtype of x.
    """
    batch, channels, width = window.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    u = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(window):
        conv_token_kernel[triton.cdiv(channels, BLOCK), batch](
            *(window, x, x.stride(0), weight.contiguous(), weight if bias is None else bias.contiguous(), u, channels),
            WIDTH=width,
            BIASED=bias is not None,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return u
