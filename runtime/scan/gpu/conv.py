"""Launching the causal convolution that feeds the scan, with its activation: each number is read and written once."""

from __future__ import annotations

import torch
import triton

from ssmc.runtime.scan.gpu import kernels
from ssmc.runtime.scan.gpu.chunks import rows

BLOCK, TOKENS, WARPS = 128, 16, 4


def causal_conv_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
) -> torch.Tensor:
    """Depthwise causal convolution with channels last, and silu: u_t = silu(bias + sum_k w_k x_{t-K+1+k}).

    Args:
        x: (B, L, D).
        weight: (D, 1, K).
        bias: (D,) or None.
        history: (B, K - 1, D) the inputs before x, of any strides; None stands for zeros.

    Returns:
        (B, L, D) contiguous, in the dtype of x.
    """
    x = rows(x)
    batch, length, channels = x.shape
    u = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not u.numel():
        return u
    before = x if history is None else history
    tokens = min(TOKENS, triton.next_power_of_2(length))
    with torch.cuda.device_of(x):
        kernels.conv_kernel[triton.cdiv(channels, BLOCK), triton.cdiv(length, tokens), batch](
            *(x, x.stride(0), x.stride(1), before, *before.stride()),
            *(weight.contiguous(), weight if bias is None else bias.contiguous(), u, length, channels),
            WIDTH=weight.shape[-1],
            TOKENS=tokens,
            BLOCK=BLOCK,
            BIASED=bias is not None,
            CONTINUES=history is not None,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return u
