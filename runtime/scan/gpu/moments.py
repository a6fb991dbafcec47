"""Launching the sums over all states, which the kernel takes while it has the states in registers."""

from __future__ import annotations

import torch
import triton

from ssmc.runtime.scan.gpu import kernels
from ssmc.runtime.scan.gpu.chunks import Chunked, Chunks
from ssmc.runtime.scan.gpu.plans import chunks_for, gpu_of
from ssmc.runtime.scan.inputs import ScanInputs
from ssmc.runtime.scan.moments import Moments, added, quartic_of_grams, stretches

BLOCK, WARPS = 64, 4
LONGEST_CHUNK = 256  # tokens whose squares one float32 sum takes in
GRAM_BYTES = 64 << 20  # of the matrices that wait to be added up
SMALLEST_DOT = 16  # the sides of a matrix in Triton's product


def scan_moments(
    inputs: ScanInputs, state: torch.Tensor | None = None, chunk: int = LONGEST_CHUNK, gram_bytes: int = GRAM_BYTES
) -> Moments:
    """As `moments.moments_of_states`, for tensors of a GPU; the same bits every time.

    Args:
        inputs: what the scan reads.
        state: (B, D, N) before the first token; None starts from zero.
        chunk: tokens a program sums over at most.
        gram_bytes: memory for the matrices that wait to be added up.
    """
    blocks = triton.cdiv(inputs.d_inner, BLOCK)
    tokens = max(1, gram_bytes // (4 * inputs.batch * blocks * inputs.d_state**2))
    total = None
    for part in stretches(inputs, tokens):
        sums = _moments(part, state, chunk)
        state = sums.state
        total = sums if total is None else added(total, sums)
    if total is None:
        raise ValueError("there are no sums over no tokens")
    return total


def _moments(inputs: ScanInputs, state: torch.Tensor | None, longest: int) -> Moments:
    """The sums over a stretch that is short enough to keep an (N, N) matrix per token and block of channels."""
    plan = chunks_for(inputs.batch * inputs.d_inner, inputs.d_state, inputs.length, gpu_of(inputs.u)[1])
    chunk = triton.cdiv(min(plan.chunk, longest), plan.tokens) * plan.tokens
    scan = Chunked(inputs, state, Chunks(BLOCK, 1, plan.tokens, chunk))
    blocks, chunks, batch = scan.grid
    N, D = inputs.d_state, inputs.d_inner
    squares = torch.empty(3, batch, chunks, N, D, dtype=torch.float32, device=inputs.u.device)
    grams = torch.empty(blocks, batch, inputs.length, N, N, dtype=torch.float32, device=inputs.u.device)
    final = torch.empty(batch, D, N, dtype=torch.float32, device=inputs.u.device)
    starts = scan.A if scan.starts is None else scan.starts
    kernels.moments_kernel[scan.grid](
        *scan.sequences,
        *(scan.A, scan.bias, starts, *squares, grams, final),
        *(inputs.length, scan.chunk, D, N),
        PART=max(SMALLEST_DOT, triton.next_power_of_2(N)),
        BLOCK=BLOCK,
        SOFTPLUS=inputs.dt_bias is not None,
        GATED=inputs.z is not None,
        STARTED=scan.starts is not None,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    before, after, readouts = squares.double().sum((1, 2))  # (N, D) each
    readers = inputs.C.double().square().sum((0, 1))
    quartic = quartic_of_grams(grams.double().sum(0).flatten(0, 1), inputs.C)
    return Moments(final, before, after, readouts, readers, quartic)
