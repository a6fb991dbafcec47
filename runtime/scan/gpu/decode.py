"""Launching the scan of one token per sequence."""

from __future__ import annotations

import torch
import triton

from ssmc.runtime.scan.gpu import kernels
from ssmc.runtime.scan.gpu.chunks import parts_of, rows
from ssmc.runtime.scan.inputs import ScanInputs

BLOCK = 64  # channels of a program
WARPS = 4


def scan_token(inputs: ScanInputs, state: torch.Tensor, in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of every sequence, (B, 1, D); as `reference.selective_scan`, for tensors of a GPU.

    Args:
        inputs: of one token.
        state: (B, D, N) float32 before it.
        in_place: whether `state` is overwritten, which saves reading and writing it once more; a state that is not
            float32 or does not lie together is copied all the same.

    Returns:
        Output (B, 1, D) and the state after the token.
    """
    before = state.float().contiguous()
    after = before if in_place or before is not state else torch.empty_like(before)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    u, dt, B, C = (rows(t) for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
    z = u if inputs.z is None else rows(inputs.z)
    kernels.token_kernel[triton.cdiv(inputs.d_inner, BLOCK), inputs.batch](
        *(u, u.stride(0), dt, dt.stride(0), z, z.stride(0), B, B.stride(0), C, C.stride(0)),
        (inputs.A if inputs.A_log is None else inputs.A_log).contiguous(),
        dt if inputs.dt_bias is None else inputs.dt_bias.contiguous(),
        inputs.D.contiguous(),
        *(before, after, y, inputs.d_inner),
        STATES=inputs.d_state,
        PARTS=parts_of(inputs.d_state),
        BLOCK=BLOCK,
        WHOLE=inputs.d_inner % BLOCK == 0,
        SOFTPLUS=inputs.dt_bias is not None,
        GATED=inputs.z is not None,
        LOG_RATES=inputs.A_log is not None,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y, after
