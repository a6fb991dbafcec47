"""Launching Mamba-2's scan of one token per sequence."""

from __future__ import annotations

import torch
import triton

from ssmc.runtime.scan.gpu.ssd import kernels
from ssmc.runtime.scan.inputs import SsdInputs

LOADS = 16  # numbers of the state a thread holds
SMALL = 1 << 22  # numbers in all states: below, what counts is how soon a program is done, and one warp never waits


def scan_token(inputs: SsdInputs, state: torch.Tensor, in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of every sequence, (B, 1, D); as `ssd.ssd_scan`, for tensors of a GPU.

    Args:
        inputs: of one token.
        state: (B, H, P, N) before it.
        in_place: whether `state` is overwritten; one that is not float32 or does not lie together is copied all the
            same.

    Returns:
        Output (B, 1, D) and the state after the token.
    """
    before = state.float().contiguous()
    after = before if in_place or before is not state else torch.empty_like(before)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    u, dt, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
    part = triton.next_power_of_2(inputs.d_state)
    warps = 1 if before.numel() <= SMALL else 4
    block = max(1, min(triton.next_power_of_2(inputs.head_dim), 32 * warps * LOADS // part))
    A = inputs.A.float().contiguous() if inputs.A_log is None else inputs.A_log.contiguous()
    low, high = inputs.dt_limit
    kernels.token_kernel[triton.cdiv(inputs.head_dim, block), inputs.heads, inputs.batch](
        *(u, u.stride(0), dt, dt.stride(0), B, B.stride(0), B.stride(2), C, C.stride(0), C.stride(2)),
        *(A, A if inputs.dt_bias is None else inputs.dt_bias.contiguous(), inputs.D.contiguous()),
        *(before, after, y, inputs.heads, inputs.heads // inputs.groups, inputs.head_dim, inputs.d_state),
        *(float(low), float(high)),
        PART=part,
        BLOCK=block,
        SOFTPLUS=inputs.dt_bias is not None,
        LIMITED=inputs.is_limited,
        LOG_RATES=inputs.A_log is not None,
        num_warps=warps,
    )
    return y, after
