"""The selective scan with mamba_ssm's own CUDA and Triton kernels, where that package is installed.

Its prefill kernel wants time as the last axis and one dtype for all sequences, and always starts from a zero state; its
decode kernel updates a state in place. What it cannot do, continuing a prompt from a state, our Triton scan does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ssmc.runtime.scan.inputs import ScanInputs
from ssmc.runtime.scan.moments import Moments

__all__ = ["kernels", "scan_moments", "scan_states", "selective_scan"]


@cache
def kernels() -> tuple[Callable, Callable]:
    """mamba_ssm's `selective_scan_fn` and `selective_state_update`.

    Raises:
        Exception: whatever importing a package with CUDA kernels raises where it is missing or does not fit.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return selective_scan_fn, selective_state_update


def scan_moments(inputs: ScanInputs, state: torch.Tensor | None = None) -> Moments:
    """Sums over all states, which mamba_ssm has no kernel for: as `gpu.scan_moments`."""
    from ssmc.runtime.scan import gpu

    return gpu.scan_moments(inputs, state)


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None) -> torch.Tensor:
    """All hidden states, which mamba_ssm has no kernel for: as `gpu.scan_states`."""
    from ssmc.runtime.scan import gpu

    return gpu.scan_states(inputs, state)


def selective_scan(
    inputs: ScanInputs, state: torch.Tensor | None = None, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `gpu.selective_scan`."""
    scan, update = kernels()
    inputs = inputs.with_rates()
    fused = inputs.dt_bias is not None
    bias = inputs.dt_bias.float() if fused else None
    dtype = inputs.u.dtype if fused else torch.promote_types(inputs.u.dtype, inputs.dt.dtype)
    u, dt, B, C = (t.to(dtype) for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z.to(dtype)
    A, D = inputs.A.float().contiguous(), inputs.D.float()
    if state is None:
        u, dt, B, C, z = (t if t is None else t.transpose(1, 2) for t in (u, dt, B, C, z))  # (B, D, L), (B, N, L)
        y, final = scan(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=fused, return_last_state=True)
        return y.transpose(1, 2).to(inputs.u.dtype), final
    if inputs.length > 1:
        from ssmc.runtime.scan import gpu

        return gpu.selective_scan(inputs, state)
    after = state.float().contiguous()
    after = after if in_place or after is not state else state.clone()
    u, dt, B, C, z = (t if t is None else t[:, 0] for t in (u, dt, B, C, z))
    bias = torch.zeros_like(D) if bias is None else bias  # the kernel asks its stride even where there is none
    y = update(after, u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=fused)
    return y[:, None].to(inputs.u.dtype), after
