"""The selective scan on a GPU, in Triton: no compiler, no build, only the `triton` that comes with PyTorch for CUDA.

Importing this imports triton. With TRITON_INTERPRET=1 set before that, the kernels run on CPU tensors through Triton's
interpreter, thousands of times slower: that is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
from triton import JITFunction

from ssmc.runtime.scan import reference
from ssmc.runtime.scan.accelerators import needs_gradients
from ssmc.runtime.scan.gpu import backward, chunks, kernels, moments
from ssmc.runtime.scan.gpu.chunks import Chunks, parts_of
from ssmc.runtime.scan.gpu.conv import causal_conv_silu
from ssmc.runtime.scan.gpu.decode import scan_token
from ssmc.runtime.scan.gpu.lanes import Lanes
from ssmc.runtime.scan.gpu.plans import Plan, chunks_for, gpu_of, plan_for, run
from ssmc.runtime.scan.gpu.ssd import gated_norm, ssd_moments, ssd_scan
from ssmc.runtime.scan.inputs import ScanInputs
from ssmc.runtime.scan.moments import Moments

__all__ = [
    "INTERPRETED",
    "Chunks",
    "Lanes",
    "Plan",
    "causal_conv_silu",
    "gated_norm",
    "parts_of",
    "plan_for",
    "scan_moments",
    "scan_states",
    "selective_scan",
    "ssd_moments",
    "ssd_scan",
]

INTERPRETED = not isinstance(kernels.token_kernel, JITFunction)  # the kernels run on CPU tensors


def selective_scan(
    inputs: ScanInputs, state: torch.Tensor | None = None, *, in_place: bool = False, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, with first derivatives, for a GPU's tensors.

    Args:
        inputs: what the scan reads; `dt` before or after bias and softplus.
        state: (B, D, N) before the first token; None starts from zero.
        in_place: whether the state of a single token may be overwritten with the one after it.
        plan: how to cut the work of several tokens, for measurements; None chooses.
    """
    if not inputs.u.numel():  # an empty grid cannot be launched
        return reference.selective_scan(inputs.with_time_steps(), state)
    grad = needs_gradients([t for t in (*vars(inputs).values(), state) if t is not None])
    with torch.cuda.device_of(inputs.u):
        if state is not None and inputs.length == 1 and plan is None and not grad:
            return scan_token(inputs, state, in_place)
        inputs = inputs.with_rates()
        if grad:
            return backward.selective_scan(inputs, state)
        return run(inputs, state, plan)


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None, plan: Chunks | None = None) -> torch.Tensor:
    """All hidden states; as `reference.scan_states`, without gradients, for tensors of a GPU."""
    if not inputs.u.numel():
        return reference.scan_states(inputs.with_time_steps(), state)
    inputs = inputs.with_rates()
    with torch.cuda.device_of(inputs.u):
        if plan is None:
            channels = inputs.batch * inputs.d_inner
            plan = chunks_for(channels, inputs.d_state, inputs.length, gpu_of(inputs.u)[1])
        return chunks.scan_states(inputs, state, plan)


def scan_moments(inputs: ScanInputs, state: torch.Tensor | None = None) -> Moments:
    """Sums over all states; as `moments_of_states`, without gradients, for tensors of a GPU."""
    with torch.cuda.device_of(inputs.u):
        return moments.scan_moments(inputs.with_rates(), state)
