"""Mamba-2's scan on a GPU, in Triton: prefill in matrix products on tensor cores, decode, and the gated norm."""

from __future__ import annotations

import torch

from ssmc.runtime.scan import ssd as plain
from ssmc.runtime.scan.accelerators import needs_gradients
from ssmc.runtime.scan.gpu.ssd import backward, moments, prefill
from ssmc.runtime.scan.gpu.ssd.decode import scan_token
from ssmc.runtime.scan.gpu.ssd.norm import gated_norm
from ssmc.runtime.scan.gpu.ssd.prefill import Plan, gpu_of, parts_of, plan_for
from ssmc.runtime.scan.inputs import SsdInputs
from ssmc.runtime.scan.moments import SsdMoments

__all__ = ["Plan", "gated_norm", "gpu_of", "parts_of", "plan_for", "ssd_moments", "ssd_scan"]


def ssd_scan(
    inputs: SsdInputs, state: torch.Tensor | None = None, *, in_place: bool = False, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `scan.ssd.ssd_scan`, for tensors of a GPU.

    Args:
        inputs: what the scan reads; `dt` before or after bias and softplus.
        state: (B, H, P, N) before the first token; None starts from zero.
        in_place: whether the state of a single token may be overwritten with the one after it.
        plan: how to cut the work of several tokens, for measurements; None chooses.
    """
    if not inputs.u.numel() or not inputs.d_state:  # an empty grid cannot be launched
        return plain.ssd_scan(inputs.with_time_steps(), state)
    if needs_gradients([t for t in (*vars(inputs).values(), state) if isinstance(t, torch.Tensor)]):
        return backward.ssd_scan(inputs.with_rates(), state)
    with torch.cuda.device_of(inputs.u):
        if state is not None and inputs.length == 1 and plan is None:
            return scan_token(inputs, state, in_place)
        return prefill.scan(inputs.with_rates(), state, plan)


def ssd_moments(inputs: SsdInputs, gain: torch.Tensor, state: torch.Tensor | None = None) -> SsdMoments:
    """Sums over all states of one group of heads, without gradients, for tensors of a GPU; see `scan.ssd_moments`."""
    with torch.cuda.device_of(inputs.u):
        return moments.ssd_moments(inputs.with_rates(), gain, state)
