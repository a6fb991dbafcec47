"""Launching the gated norm between Mamba-2's scan and out_proj: y and z are read once and the result written once."""

from __future__ import annotations

import torch
import triton

from ssmc.runtime.scan.gpu.ssd import kernels


def gated_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float, gate_first: bool = True
) -> torch.Tensor:
    """norm(y silu(z)) with a mean square for each group of channels; norm(y) silu(z) without `gate_first`.

    Args:
        y: (B, L, D).
        z: (B, L, D) the gate before silu, of any strides over sequences and tokens.
        weight: (D,).
        groups: of channels, neighbours.
        eps: added to the mean square.
        gate_first: whether the gate acts before the norm.

    Returns:
        (B, L, D) in the dtype of y; with `gate_first` in what that and the weight's promote to, as in transformers.
    """
    batch, length, channels = y.shape
    dtype = torch.promote_types(y.dtype, weight.dtype) if gate_first else y.dtype
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    if not out.numel():
        return out
    y, z = y.contiguous(), z if z.stride(-1) == 1 else z.contiguous()
    width = channels // groups
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(y):
        kernels.norm_kernel[batch * length, groups](
            *(y, channels, z, z.stride(0), z.stride(1), weight.contiguous(), out, length, width, float(eps)),
            BLOCK=block,
            GATE_FIRST=gate_first,
            num_warps=min(8, max(1, block // 256)),
        )
    return out
