"""Launching Mamba-2's scan of many tokens.

A GPU wants a few programs a multiprocessor, and one sequence has a few dozen heads. So time is cut into stretches that
run side by side, in two passes: the first finds what each stretch makes of a zero state, the second starts each from
the state those add up to and reads it out. Only the states between stretches go through memory, and there are only as
many of these as it takes to fill the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton

from ssmc.runtime.scan.gpu.ssd import kernels
from ssmc.runtime.scan.inputs import SsdInputs

INTERPRETED = not isinstance(kernels.scan_kernel, triton.JITFunction)
SMALLEST = 16  # side of a tile that tensor cores multiply
WIDEST = 128  # tile of the states
PROGRAMS = 2  # of a multiprocessor
THIRD = 168  # registers of a thread with which a third program of 4 warps fits on a multiprocessor
STEPS_BLOCK = 8  # heads whose time steps a program goes through
MOST_STRETCHES = 16  # each adds up the states of all before it


@dataclass(frozen=True)
class Gpu:
    """What a plan must know of a GPU."""

    multiprocessors: int = 1
    shared_operands: bool = True  # tensor cores read tiles from shared memory (Hopper); else from registers


@dataclass(frozen=True)
class Plan:
    """How a scan is cut into programs; chosen by shape, because trying several takes a minute of compiling."""

    block: int  # channels of a program
    tokens: int  # of a chunk, computed together
    warps: int  # of a program
    stages: int  # chunks in flight
    stretch: int  # tokens of a program; a multiple of `tokens`
    widest: int = WIDEST  # most states of a tile
    registers: int | None = None  # of a thread, at most


def plan_for(inputs: SsdInputs, gpu: Gpu) -> Plan:
    """How to cut this scan for a GPU, by what the compiled kernels need and what an H100 showed (docs/gpu_ssd.md).

    Tiles are as large as registers allow without spilling more than a few of them: a tensor core that reads operands
    from registers, and the TF32 parts of float32 and float16, take smaller ones.
    """
    if inputs.u.dtype == torch.float32:
        tokens, warps, stages, widest = 16, 4, 1, 32
    elif inputs.u.dtype == torch.float16 or not gpu.shared_operands:
        tokens, warps, stages, widest = 32, 4, 1, 64
    else:
        wide = inputs.d_state > WIDEST
        tokens, warps, stages, widest = 64, 8 if wide else 4, 1 if wide else 2, WIDEST if wide else 64
    block = min(64, max(SMALLEST, triton.next_power_of_2(inputs.head_dim)))
    programs = inputs.batch * inputs.heads * triton.cdiv(inputs.head_dim, block)
    filled = programs >= gpu.multiprocessors  # then a second pass costs more than it fills
    stretches = 1 if filled else min(MOST_STRETCHES, triton.cdiv(gpu.multiprocessors * PROGRAMS, programs))
    stretch = max(128, triton.cdiv(triton.cdiv(inputs.length, tokens), stretches) * tokens)
    if tokens == 64 and inputs.d_state <= SMALLEST:  # so few states leave registers and shared memory
        if programs * stretches > PROGRAMS * gpu.multiprocessors:
            return Plan(block, tokens, warps, stages, stretch, widest, registers=THIRD)
        stages = 3 if filled else stages
    return Plan(block, tokens, warps, stages, stretch, widest)


def parts_of(states: int, widest: int = WIDEST) -> tuple[int, ...]:
    """Powers of two, largest first, that hold all states: as few as possible, or one more if that wastes fewer."""
    whole, rest = divmod(states, widest)
    one = max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0
    half = one // 2
    last = max(SMALLEST, triton.next_power_of_2(rest - half)) if half >= SMALLEST else one
    return (widest,) * whole + ((half, last) if last < half else (one,) if one else ())


def scan(
    inputs: SsdInputs, state: torch.Tensor | None = None, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `ssd.ssd_scan`, without gradients, for tensors of a GPU."""
    plan = plan or plan_for(inputs, gpu_of(inputs.u))
    launch = Launch(inputs, plan)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = torch.empty(launch.state_shape, dtype=torch.float32, device=y.device)
    before = final if state is None else state.float().contiguous()
    kernels.scan_kernel[launch.grid](
        *(*launch.u, *launch.of_steps, *launch.B, *launch.C, inputs.D.contiguous(), before),
        *(*launch.stretch_ends(), y, final, *launch.sizes),
        **launch.options,
        CONTINUES=state is not None,
    )
    return y, final


class Launch:
    """What all kernels over many tokens are given."""

    def __init__(self, inputs: SsdInputs, plan: Plan):
        dtype = torch.promote_types(torch.promote_types(inputs.u.dtype, inputs.B.dtype), inputs.C.dtype)
        # a tensor, and its strides over sequences, tokens and, for B and C, groups
        self.u, self.dt = (_strided(t, 2) for t in (inputs.u.to(dtype), inputs.dt))
        self.B, self.C = (_strided(t.to(dtype), 3) for t in (inputs.B, inputs.C))
        self.A = inputs.A.float().contiguous()
        self.bias = self.A if inputs.dt_bias is None else inputs.dt_bias.contiguous()
        self.stretches = max(1, triton.cdiv(inputs.length, plan.stretch))
        self.grid = (inputs.heads * triton.cdiv(inputs.head_dim, plan.block), self.stretches, inputs.batch)
        self.state_shape = (inputs.batch, inputs.heads, inputs.head_dim, inputs.d_state)
        per_group = inputs.heads // inputs.groups
        self.sizes = (inputs.length, plan.stretch, inputs.heads, per_group, inputs.head_dim, inputs.d_state)
        self.limits = tuple(float(limit) for limit in inputs.dt_limit)
        self.has_bias, self.is_limited = inputs.dt_bias is not None, inputs.is_limited
        self.options = {
            "PARTS": parts_of(inputs.d_state, plan.widest),
            "BLOCK": plan.block,
            "TOKENS": plan.tokens,
            "MODE": _mode(dtype),
            "num_warps": plan.warps,
            "num_stages": plan.stages,
            "maxnreg": plan.registers,
        }

    @cached_property
    def of_steps(self) -> tuple[torch.Tensor, ...]:
        """What `steps_kernel` makes of the time steps."""
        batch, heads, _, _ = self.state_shape
        chunks = triton.cdiv(self.sizes[0], self.options["TOKENS"])
        exact = self.options["MODE"] == kernels.EXACT.value
        shape = (4 if exact else 3, batch, heads, chunks * self.options["TOKENS"])
        columns, sums, kept, *rest = torch.empty(shape, dtype=torch.float32, device=self.A.device)
        rest = rest[0] if exact else sums  # read by nobody
        block = min(STEPS_BLOCK, triton.next_power_of_2(heads))
        kernels.steps_kernel[chunks, triton.cdiv(heads, block), batch](
            *(*self.dt, self.A, self.bias, columns, sums, rest, kept, self.sizes[0], heads, *self.limits),
            TOKENS=self.options["TOKENS"],
            HEADS=block,
            SOFTPLUS=self.has_bias,
            LIMITED=self.is_limited,
            MODE=self.options["MODE"],
            num_warps=4,
        )
        return columns, sums, rest, kept

    def stretch_ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each stretch but the last makes of a zero state, and the logarithm of its decay."""
        if self.stretches == 1:
            return self.A, self.A  # read by nobody
        batch, *shape = self.state_shape
        ends = torch.empty(batch, self.stretches - 1, *shape, dtype=torch.float32, device=self.A.device)
        totals = torch.empty(batch, self.stretches - 1, shape[0], dtype=torch.float32, device=self.A.device)
        programs, _, _ = self.grid
        _columns, sums, _rest, kept = self.of_steps
        kernels.ends_kernel[programs, self.stretches - 1, batch](
            *(*self.u, sums, kept, *self.B, ends, totals), *self.sizes, **self.options
        )
        return ends, totals


def _mode(dtype: torch.dtype) -> int:
    """What tensor cores multiply; Triton's interpreter takes bfloat16 for integers."""
    if dtype == torch.float32:
        return kernels.EXACT.value
    return (kernels.BFLOAT16 if dtype == torch.bfloat16 and not INTERPRETED else kernels.TF32).value


def _strided(tensor: torch.Tensor, axes: int) -> tuple[torch.Tensor | int, ...]:
    """A tensor whose last axis lies together, copied only if it must be, and the strides of the others."""
    tensor = tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
    return tensor, *tensor.stride()[:axes]


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """The GPU a tensor is on; the interpreter runs one program after the other."""
    if not tensor.is_cuda:
        return Gpu()
    found = torch.cuda.get_device_properties(tensor.device)
    return Gpu(found.multi_processor_count, found.major in (9, 10))
