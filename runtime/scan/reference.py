"""The selective scan in plain torch, one time step after the other: the oracle, and the fallback on any device."""

from __future__ import annotations

from collections.abc import Iterator

from ssmc.runtime.later import F, torch
from ssmc.runtime.scan.inputs import ScanInputs


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None) -> torch.Tensor:
    """All hidden states of the recurrence.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) state before the first token; None starts from zero.

    Returns:
        (B, L + 1, N, D) float32. Entry t is the state before token t, so `[:, :-1]` is h_{t-1}, `[:, 1:]` is h_t
        and `[:, -1]` the final state.
    """
    return torch.stack(list(_walk(inputs, state)), dim=1)


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) state before the first token; None starts from zero. It is not modified.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, gated when `inputs.z` is given, and the final state
        (B, D, N) in float32.
    """
    walk = _walk(inputs, state)
    h = next(walk)
    C = inputs.C.float().unbind(1)
    rows = []
    for C_t in C:
        h = next(walk)
        rows.append((C_t[:, None, :] @ h).squeeze(1))  # (B, D)
    u = inputs.u.float()
    y = inputs.D.float() * u + (torch.stack(rows, dim=1) if rows else torch.zeros_like(u))
    if inputs.z is not None:
        y = y * F.silu(inputs.z.float())
    return y.to(inputs.u.dtype), h.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _walk(inputs: ScanInputs, state: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The states (B, N, D) before the first token and after each one; only the consumer keeps them."""
    # contiguous: elementwise operations on mixed layouts are an order of magnitude slower
    h = (inputs.initial_state() if state is None else state.float()).transpose(1, 2).contiguous()
    yield h
    A = inputs.A.float().t().contiguous()  # (N, D)
    for t in range(inputs.length):
        dt = inputs.dt[:, t, None, :].float()  # (B, 1, D)
        drive = dt * inputs.u[:, t, None, :].float() * inputs.B[:, t, :, None].float()  # (B, N, D)
        h = torch.exp(dt * A) * h + drive
        yield h
