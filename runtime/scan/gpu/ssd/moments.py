"""Launching the sums over the states of a Mamba-2 that calibration asks for."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from ssmc.runtime.scan.gpu.ssd import kernels, moments_kernels, prefill
from ssmc.runtime.scan.inputs import SsdInputs
from ssmc.runtime.scan.moments import SsdMoments

TILE = 64  # states
WARPS = 8
PROGRAMS = 3  # of a multiprocessor: each waits for one token's numbers at a time
MOST_BYTES = 256 << 20  # of sums over stretches


def ssd_moments(inputs: SsdInputs, gain: torch.Tensor, state: torch.Tensor | None = None) -> SsdMoments:
    """Sums over all states of one group of heads; see `scan.ssd_moments`."""
    if not inputs.u.numel():
        raise ValueError("there are no sums over no tokens")
    inputs = inputs.with_time_steps()
    inputs = replace(inputs, dt=inputs.dt.float())
    tile = min(TILE, max(prefill.SMALLEST, triton.next_power_of_2(inputs.d_state)))
    tiles = triton.cdiv(inputs.d_state, tile)
    pairs = [(left, right) for left in range(tiles) for right in range(left, tiles)]
    plan = prefill.plan_for(inputs, prefill.gpu_of(inputs.u))
    plan = replace(plan, stretch=_stretch(inputs, plan, len(pairs)))
    launch = prefill.Launch(inputs, plan)
    programs, stretches, batch = launch.grid
    whole = {"dtype": torch.float32, "device": inputs.u.device}
    after, readouts, cross = torch.empty(3, batch, stretches, *launch.state_shape[1:], **whole)
    grams = torch.empty(batch, stretches, programs, len(pairs), tile, tile, **whole)
    final = torch.empty(launch.state_shape, **whole)
    before = final if state is None else state.float().contiguous()
    moments_kernels.moments_kernel[programs * len(pairs), stretches, batch](
        *(*launch.u, gain.float().contiguous(), *launch.dt, *launch.B, *launch.C, launch.A, before),
        *(*launch.stretch_ends(), after, readouts, cross, grams, final, inputs.length, plan.stretch, inputs.heads),
        *(inputs.heads // inputs.groups, inputs.head_dim, inputs.d_state),
        TILE=tile,
        BLOCK=plan.block,
        CONTINUES=state is not None,
        MODE=(kernels.EXACT if launch.options["MODE"] == kernels.EXACT.value else kernels.TF32).value,
        num_warps=WARPS,
    )
    after = after.double().sum((0, 1))  # (H, P, N)
    shifted = after - final.double().square().sum(0) + (0 if state is None else before.double().square().sum(0))
    gram = torch.zeros(tiles * tile, tiles * tile, dtype=torch.float64, device=inputs.u.device)
    for (left, right), sums in zip(pairs, grams.double().sum((0, 1, 2)), strict=True):
        gram[left * tile : (left + 1) * tile, right * tile : (right + 1) * tile] = sums
        gram[right * tile : (right + 1) * tile, left * tile : (left + 1) * tile] = sums.t()
    skip = (inputs.u.float() * gain.float()).square().double().sum((0, 1)).unflatten(0, (inputs.heads, -1)).sum(1)
    by_channel = [sums.flatten(0, 1).t() for sums in (shifted, after, readouts.double().sum((0, 1)))]  # (N, D)
    return SsdMoments(
        final,
        *by_channel,
        readers=inputs.C.double().square().sum((0, 1, 2)),
        gram=gram[: inputs.d_state, : inputs.d_state],
        cross=cross.double().sum((0, 1, 3)),
        skip=skip,
    )


def _stretch(inputs: SsdInputs, plan: prefill.Plan, pairs: int) -> int:
    """Tokens of a program: enough programs, and sums over stretches that fit."""
    gpu = prefill.gpu_of(inputs.u)
    programs = inputs.batch * inputs.heads * triton.cdiv(inputs.head_dim, plan.block) * pairs
    fit = max(1, MOST_BYTES // (12 * inputs.batch * inputs.d_inner * inputs.d_state))
    stretches = min(prefill.MOST_STRETCHES, fit, triton.cdiv(gpu.multiprocessors * PROGRAMS, programs))
    return max(2 * plan.tokens, triton.cdiv(triton.cdiv(inputs.length, plan.tokens), stretches) * plan.tokens)
