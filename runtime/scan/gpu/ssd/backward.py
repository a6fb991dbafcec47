"""Gradients of Mamba-2's scan on a GPU, from the inputs alone: states are computed again, a span of chunks at a time.

The forward keeps nothing but what it reads. The backward finds the states between spans in one pass, then goes over the
spans from the last to the first: the state before and the gradient after each chunk of the span, then all gradients of
its chunks side by side. A span has as many chunks as keep what is held in between smaller than u: y, the gradients and
all this are together no more than twice the forward's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from ssmc.runtime.scan.gpu.ssd import backward_kernels, kernels, prefill
from ssmc.runtime.scan.inputs import SsdInputs

FEWEST_CHUNKS = 4  # of a span
# Shares of u's bytes; little tensors get more, so that a span fills the GPU.
STATES_SHARE, STATES_BYTES = 0.5, 6 << 20  # of the states around the chunks of a span
READERS_SHARE, READERS_BYTES = 0.2, 4 << 20  # of what slices of heads add to the gradients of B and C
PROGRAMS = 2  # of a multiprocessor
MOST_SLICES = 8  # of a group's heads


def ssd_scan(inputs: SsdInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out, with gradients; as `ssd.ssd_scan`, for tensors of a GPU.

    Args:
        inputs: what the scan reads; bias, softplus and limits of dt are applied outside, where autograd knows them.
        state: (B, H, P, N) before the first token; None starts from zero.
    """
    inputs = inputs.with_time_steps()
    return _Scan.apply(inputs.u, inputs.dt.float(), inputs.A.float(), inputs.B, inputs.C, inputs.D, state)


class _Scan(torch.autograd.Function):
    """The scan as autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(u, dt, A, B, C, D, state)
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(u):
            return prefill.scan(SsdInputs(u=u, dt=dt, A=A, B=B, C=C, D=D), state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, d_final: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        inputs = SsdInputs(**dict(zip(("u", "dt", "A", "B", "C", "D"), tensors, strict=True)))
        with torch.cuda.device_of(inputs.u):
            found = gradients(inputs, state, dy, d_final)
        wanted = [*tensors, state]
        return tuple(
            gradient.to(tensor.dtype) if needed else None
            for gradient, tensor, needed in zip(found, wanted, ctx.needs_input_grad, strict=True)
        )


@dataclass(frozen=True)
class BackwardPlan:
    """How the gradients are cut into programs."""

    block: int  # channels of a program
    tokens: int  # of a chunk
    warps: int  # of a program
    widest: int  # most states of a tile
    chunks: int  # of a span
    slices: int  # of a group's heads, for what they share: each has its own sums for B and C
    head_slices: int  # for what heads have of their own


def plan_for(inputs: SsdInputs, gpu: prefill.Gpu) -> BackwardPlan:
    """How to cut the gradients for a GPU; see `prefill.plan_for`."""
    whole = inputs.u.dtype != torch.bfloat16
    tokens = 16 if inputs.u.dtype == torch.float32 else 32 if whole or not gpu.shared_operands else 64
    widest = 32 if inputs.u.dtype == torch.float32 else 64
    block = min(32 if whole else 64, max(prefill.SMALLEST, triton.next_power_of_2(inputs.head_dim)))
    both = 2 * inputs.batch * inputs.d_inner * inputs.d_state * (4 if whole else 2)  # bytes a chunk
    fit = max(STATES_BYTES, int(STATES_SHARE * inputs.u.nbytes)) // both
    chunks = min(max(FEWEST_CHUNKS, fit), triton.cdiv(inputs.length, tokens))
    programs = chunks * inputs.groups * inputs.batch
    per_group = inputs.heads // inputs.groups
    wanted = max(1, triton.cdiv(gpu.multiprocessors * PROGRAMS, programs))
    of_a_slice = 8 * inputs.batch * chunks * tokens * inputs.groups * inputs.d_state
    slices = max(1, max(READERS_BYTES, int(READERS_SHARE * inputs.u.nbytes)) // of_a_slice)
    return BackwardPlan(
        block, tokens, 8, widest, chunks, min(MOST_SLICES, per_group, wanted, slices), min(per_group, 2 * wanted)
    )


def gradients(
    inputs: SsdInputs,
    state: torch.Tensor | None,
    dy: torch.Tensor | None,
    d_final: torch.Tensor | None,
    plan: BackwardPlan | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, dt, A, B, C, D and the first state, from those of the output and the final state.

    Args:
        inputs: what the scan read; dt float32 after softplus.
        state: (B, H, P, N) before the first token, or None.
        dy: (B, L, D) or None for zeros.
        d_final: (B, H, P, N) or None for zeros.
        plan: how to cut the work; None chooses.
    """
    plan = plan or plan_for(inputs, prefill.gpu_of(inputs.u))
    span = plan.chunks * plan.tokens
    shape = (inputs.batch, inputs.heads, inputs.head_dim, inputs.d_state)
    whole = {"dtype": torch.float32, "device": inputs.u.device}
    dy = torch.zeros_like(inputs.u) if dy is None else dy.to(inputs.u.dtype)
    last = torch.zeros(shape, **whole) if d_final is None else d_final.float().clone()
    last = last.contiguous()
    firsts = _states_between_spans(inputs, state, plan)  # before there is room for gradients: it needs most for a while
    out = Gradients(
        u=torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device),
        dt=torch.empty(inputs.dt.shape, **whole),
        B=torch.empty(inputs.B.shape, dtype=inputs.B.dtype, device=inputs.u.device),
        C=torch.empty(inputs.C.shape, dtype=inputs.C.dtype, device=inputs.u.device),
        A=torch.zeros(inputs.heads, **whole),
        D=torch.zeros(inputs.heads, **whole),
    )
    for number in reversed(range(len(firsts))):
        tokens = slice(number * span, (number + 1) * span)
        cut = {name: getattr(inputs, name)[:, tokens] for name in ("u", "dt", "B", "C")}
        _span(replace(inputs, **cut), firsts[number], dy[:, tokens], last, plan, out.tokens(tokens))
        firsts.pop()
    return out.u, out.dt, out.A, out.B, out.C, out.D, last


@dataclass(frozen=True)
class Gradients:
    """Where the gradients go."""

    u: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    A: torch.Tensor  # (H,), added to
    D: torch.Tensor  # (H,), added to

    def tokens(self, which: slice) -> Gradients:
        """Those of some tokens (views)."""
        return replace(self, **{name: getattr(self, name)[:, which] for name in ("u", "dt", "B", "C")})


def _states_between_spans(inputs: SsdInputs, state: torch.Tensor | None, plan: BackwardPlan) -> list[torch.Tensor]:
    """The state before each span, (B, H, P, N) each, as precise as those before chunks; one that is given stays."""
    launch = prefill.Launch(inputs, _forward_plan(plan))
    dtype = _kept(launch)
    if state is None:  # the zeros of one sequence serve all
        zeros = torch.zeros(1, *launch.state_shape[1:], dtype=torch.float32, device=inputs.u.device)
        before, first = (t.expand(launch.state_shape) for t in (zeros, zeros.to(dtype)))
    else:
        before = first = state.float().contiguous()
    found = [first]
    if launch.stretches > 1:
        ends, totals = launch.stretch_ends()
        for number in range(launch.stretches - 1):
            decay = torch.exp2(totals[:, number])[..., None, None]
            before = torch.addcmul(ends[:, number], decay, before)
            found.append(before.to(dtype))
    return found


def _kept(launch: prefill.Launch) -> torch.dtype:
    """What states around chunks are kept in: what tensor cores multiply."""
    return torch.bfloat16 if launch.options["MODE"] == kernels.BFLOAT16.value else torch.float32


def _span(
    inputs: SsdInputs,
    first: torch.Tensor,
    dy: torch.Tensor,
    last: torch.Tensor,
    plan: BackwardPlan,
    out: Gradients,
) -> None:
    """All gradients of a span of tokens; `last` becomes the gradient of the state before it."""
    launch = prefill.Launch(inputs, _forward_plan(plan))
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    chunks = triton.cdiv(inputs.length, plan.tokens)
    shape = (inputs.batch, chunks, *last.shape[1:])
    before, after = (torch.empty(shape, dtype=_kept(launch), device=last.device) for _ in range(2))
    walked, sizes = (launch.grid[0], inputs.batch), (inputs.heads, inputs.heads // inputs.groups)
    options = {name: launch.options[name] for name in ("PARTS", "BLOCK", "TOKENS", "MODE", "num_warps", "num_stages")}
    per_head = (inputs.head_dim, inputs.d_state)
    with_strides = (dy, *dy.stride()[:2])
    backward_kernels.states_kernel[walked](
        *(*launch.u, *launch.dt, *launch.B, launch.A, first, first.stride(0), before),
        *(inputs.length, *sizes, *per_head),
        **options,
    )
    backward_kernels.state_gradients_kernel[walked](
        *(*with_strides, *launch.dt, *launch.C, launch.A, last, after, inputs.length, *sizes, *per_head),
        **options,
    )
    sums = torch.empty(2, plan.slices, *inputs.B.shape, dtype=torch.float32, device=last.device)
    of_heads = torch.empty(2, inputs.batch, chunks, inputs.heads, dtype=torch.float32, device=last.device)
    for what, slices in (("OF_HEADS", plan.head_slices), ("OF_GROUPS", plan.slices)):
        backward_kernels.gradients_kernel[chunks, inputs.groups * slices, inputs.batch](
            *(*launch.u, *with_strides, *launch.dt, *launch.B, *launch.C, launch.A, inputs.D.contiguous()),
            *(before, after, out.u, *out.u.stride()[:2], out.dt, *out.dt.stride()[:2], *sums, *of_heads),
            *(inputs.length, *sizes, triton.cdiv(sizes[1], slices), slices, *per_head),
            **options,
            OF_HEADS=what == "OF_HEADS",
            OF_GROUPS=what == "OF_GROUPS",
        )
    out.B.copy_(sums[0].sum(0))
    out.C.copy_(sums[1].sum(0))
    for total, parts in zip((out.A, out.D), of_heads, strict=True):
        total += parts.sum((0, 1))


def _forward_plan(plan: BackwardPlan) -> prefill.Plan:
    """The same as the forward's kernels are told."""
    return prefill.Plan(plan.block, plan.tokens, plan.warps, 1, plan.chunks * plan.tokens, plan.widest)
