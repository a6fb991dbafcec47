"""The selective scan in plain torch, one time step after the other: the oracle, and the fallback on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .inputs import ScanInputs


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None) -> torch.Tensor:
    """All hidden states of the recurrence.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) state before the first token; None starts from zero.

    Returns:
        (B, L + 1, N, D) float32. Entry t is the state before token t, so `[:, :-1]` is h_{t-1}, `[:, 1:]` is h_t
        and `[:, -1]` the final state.
    """
    h = (inputs.initial_state() if state is None else state.float()).transpose(1, 2)  # (B, N, D)
    A = inputs.A.float().t()  # (N, D)
    states = [h]
    for t in range(inputs.length):
        dt = inputs.dt[:, t, None, :].float()  # (B, 1, D)
        drive = dt * inputs.u[:, t, None, :].float() * inputs.B[:, t, :, None].float()  # (B, N, D)
        h = torch.exp(dt * A) * h + drive
        states.append(h)
    return torch.stack(states, dim=1)


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) state before the first token; None starts from zero. It is not modified.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, gated when `inputs.z` is given, and the final state
        (B, D, N) in float32.
    """
    states = scan_states(inputs, state)
    y = torch.einsum("blnd,bln->bld", states[:, 1:], inputs.C.float())
    y = y + inputs.D.float() * inputs.u.float()
    if inputs.z is not None:
        y = y * F.silu(inputs.z.float())
    return y.to(inputs.u.dtype), states[:, -1].transpose(1, 2).contiguous()
