"""Launching the scan of many tokens.

A GPU wants thousands of warps, and one sequence has a few dozen blocks of channels. So time is cut into chunks that run
side by side, in two passes: the first finds what each chunk makes of a zero state, the second starts each chunk from
the state those add up to and reads it out. That computes every exponential twice, which is why there are only as many
chunks as it takes to fill the GPU, and one pass where the batch fills it already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ssmc.runtime.scan.gpu import kernels
from ssmc.runtime.scan.inputs import ScanInputs

LOG2_E = kernels.LOG2_E.value
WARP = 32
SCHEDULERS = 4  # of a multiprocessor: each runs one warp at a time
WARPS_EACH = 2  # warps a scheduler needs to hide most of what one waits for
SHORTEST_CHUNK = 32  # tokens


@dataclass(frozen=True)
class Plan:
    """How a scan is cut into programs."""

    block: int  # channels of a program
    warps: int  # of a program
    tokens: int  # loaded together
    chunk: int  # tokens of a program; a multiple of `tokens`

    @property
    def lane(self) -> int:
        """Channels of a lane."""
        return max(1, self.block // (WARP * self.warps))


def plan_for(inputs: ScanInputs, multiprocessors: int) -> Plan:
    """How to cut this scan for a GPU of that many multiprocessors.

    The blocks and tokens were chosen by the registers and instructions of the compiled kernels (docs/gpu_scan.md): they
    keep the decay rates, the states and the rows in flight in registers, without spilling.
    """
    lane, tokens = (2, 4) if inputs.d_state <= 8 else (2, 2) if inputs.d_state <= 16 else (1, 2)
    if inputs.d_state > 32:
        tokens = 1
    block = WARP * lane
    programs = inputs.batch * triton.cdiv(inputs.d_inner, block)
    slots = multiprocessors * SCHEDULERS
    chunks = 1 if programs >= slots else triton.cdiv(slots * WARPS_EACH, programs)
    chunk = max(SHORTEST_CHUNK, triton.cdiv(inputs.length, chunks))
    return Plan(block, 1, tokens, triton.cdiv(chunk, tokens) * tokens)


def parts_of(states: int) -> tuple[int, ...]:
    """Powers of two that sum to `states`, largest first: the tiles a program keeps its states in."""
    return tuple(1 << i for i in reversed(range(states.bit_length())) if states >> i & 1)


def selective_scan(
    inputs: ScanInputs, state: torch.Tensor | None = None, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for tensors of a GPU."""
    plan = plan or plan_for(inputs, multiprocessors(inputs.u))
    scan = Scan(inputs, state, plan)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = inputs.u.new_empty(inputs.batch, inputs.d_inner, inputs.d_state, dtype=torch.float32)
    z = inputs.u if inputs.z is None else rows(inputs.z)
    kernels.scan_kernel[scan.grid](
        *scan.u,
        *scan.dt,
        *(z, z.stride(0), z.stride(1)),
        *scan.B,
        *scan.C,
        *(scan.rates, scan.bias, scan.skip, scan.state, scan.ends, scan.sums, y, final),
        *(inputs.length, plan.chunk, inputs.d_inner, inputs.d_state, 0),
        **scan.options,
        GATED=inputs.z is not None,
        CONTINUES=state is not None,
    )
    return y, final


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None, plan: Plan | None = None) -> torch.Tensor:
    """All hidden states; as `reference.scan_states`, without gradients, for tensors of a GPU."""
    plan = plan or plan_for(inputs, multiprocessors(inputs.u))
    scan = Scan(inputs, state, plan)
    shape = (inputs.batch, inputs.length + 1, inputs.d_state, inputs.d_inner)
    states = torch.empty(shape, dtype=torch.float32, device=inputs.u.device)
    kernels.states_kernel[scan.grid](
        *scan.u,
        *scan.dt,
        *scan.B,
        *(scan.rates, scan.bias, scan.state, scan.ends, scan.sums, states),
        *(inputs.length, plan.chunk, inputs.d_inner, inputs.d_state, 0),
        **scan.options,
        CONTINUES=state is not None,
    )
    return states


class Scan:
    """What all kernels over many tokens are given; making it runs the first pass."""

    def __init__(self, inputs: ScanInputs, state: torch.Tensor | None, plan: Plan):
        u, dt, B, C = (rows(t) for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
        # a tensor, and its strides over sequences and tokens
        self.u, self.dt, self.B, self.C = ((t, t.stride(0), t.stride(1)) for t in (u, dt, B, C))
        # channels last, as they lie in the lanes
        self.rates = u.new_empty(inputs.d_state, inputs.d_inner, dtype=torch.float32)  # (N, D), in powers of two
        torch.mul(inputs.A.detach().t(), LOG2_E, out=self.rates)
        self.bias = inputs.dt if inputs.dt_bias is None else inputs.dt_bias.float().contiguous()
        self.skip = inputs.D.contiguous()
        self.state = self.rates if state is None else state.float().transpose(1, 2).contiguous()  # (B, N, D)
        chunks = max(1, triton.cdiv(inputs.length, plan.chunk))
        blocks = triton.cdiv(inputs.d_inner, plan.block)
        self.grid = (blocks, chunks, inputs.batch)
        self.options = {
            "PARTS": parts_of(inputs.d_state),
            "BLOCK": plan.block,
            "LANE": plan.lane,
            "TOKENS": plan.tokens,
            "WHOLE": inputs.d_inner % plan.block == 0,
            "SOFTPLUS": inputs.dt_bias is not None,
            "num_warps": plan.warps,
            "enable_fp_fusion": True,  # Triton 3.10 will not by itself
        }
        self.ends = self.sums = self.rates  # read by nobody unless there are several chunks
        if chunks > 1:
            shape = (inputs.batch, chunks - 1, inputs.d_state, inputs.d_inner)
            self.ends = torch.empty(shape, dtype=torch.float32, device=u.device)
            self.sums = torch.empty((*shape[:2], inputs.d_inner), dtype=torch.float32, device=u.device)
            kernels.chunk_ends_kernel[blocks, chunks - 1, inputs.batch](
                *self.u,
                *self.dt,
                *self.B,
                *(self.rates, self.bias, self.ends, self.sums),
                *(plan.chunk, inputs.d_inner, inputs.d_state, 0),
                **self.options,
            )


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A (B, L, D) or (B, L, N) tensor whose last axis lies together, copied only if it must be."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the GPU the tensor is on; 1 for the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
