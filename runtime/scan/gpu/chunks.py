"""The scan with channels along the lanes of a warp and time cut into chunks that run side by side.

A lane has one or two channels with all their states and decay rates in registers and takes one token after the other:
no shuffles, no shared memory, no barriers in the loop. B_t and C_t are the same for all lanes. Where the batch alone
does not fill the GPU, time is cut into chunks: a first pass finds what each chunk makes of a zero state, `carry_kernel`
adds those up, and a second pass reads each chunk out from the state it starts with. That computes every exponential
but those of the last chunk twice, so there are only as many chunks as it takes, and one where the batch is large.

The rows of the next tokens are asked for before the present ones are computed: nothing in the loop waits for memory.
From Hopper on, the programs of a later kernel may take their places and load their first tokens while the kernel before
still runs, and wait only where they need what it writes (programmatic dependent launch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssmc.runtime.scan.gpu.kernels import LOG2_E, advance, read_out, silu, time_step, zero_tiles
from ssmc.runtime.scan.gpu.lanes import chain
from ssmc.runtime.scan.inputs import ScanInputs

WARP = 32
CARRIED = 2048  # numbers that a program of `carry_kernel` loads together
GROUPS = (16, 64, 128)  # chunks they come from: the first that holds all, so that few kernels are compiled

ENDS, OUTPUTS, STATES = (tl.constexpr(mode) for mode in range(3))  # what `chunk_kernel` writes


@dataclass(frozen=True)
class Chunks:
    """How the work is cut among programs.

    Attributes:
        block: channels of a program.
        warps: of a program.
        tokens: loaded together, while as many before them are computed.
        chunk: tokens of a program, a multiple of `tokens`; at least the length: one pass.
        registers: of a thread at most, so that more programs run side by side; 0: as many as it takes.
        overlap: start the kernel of a later pass before the one before it has ended; needs compute capability 9.0.
    """

    block: int = 64
    warps: int = 1
    tokens: int = 4
    chunk: int = 1 << 30
    registers: int = 0
    overlap: bool = False


@triton.jit
def load_states(ptr, d, wanted, n_step, d_step, PARTS: tl.constexpr):
    """All states of a block of channels, a tuple of tiles (PARTS[i], BLOCK); zeros unless wanted (BLOCK,)."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        at = (first + tl.arange(0, PARTS[i]))[:, None] * n_step + d[None, :] * d_step
        tiles = tiles + (tl.load(ptr + at, mask=wanted[None, :], other=0.0),)
        first += PARTS[i]
    return tiles


@triton.jit
def store_states(ptr, d, channels, n_step, d_step, tiles, PARTS: tl.constexpr):
    """Store what `load_states` loads."""
    first = 0
    for i in tl.static_range(len(PARTS)):
        at = (first + tl.arange(0, PARTS[i]))[:, None] * n_step + d[None, :] * d_step
        tl.store(ptr + at, tiles[i], mask=(d < channels)[None, :])
        first += PARTS[i]


@triton.jit
def load_reader(ptr, PARTS: tl.constexpr, ALIGNED: tl.constexpr):
    """A row of B or C as a tuple of vectors (PARTS[i],).

    ALIGNED bytes divide the row's address. Triton does not know it of a slice of a wider row, and would load every
    number by itself.
    """
    ITEM: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    vectors = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        at = ptr + (first + tl.arange(0, PARTS[i]))
        vectors = vectors + (tl.load(tl.multiple_of(at, min(ALIGNED, PARTS[i] * ITEM))),)
        first += PARTS[i]
    return vectors


@triton.jit
def load_rows(ptr, token, left, d, channels, TOKENS: tl.constexpr):
    """A block of channels of the next TOKENS tokens; zeros for those past the last of `left`."""
    rows = ()
    for k in tl.static_range(TOKENS):
        rows = rows + (tl.load(ptr + k * token + d, mask=(d < channels) & (k < left), other=0.0),)
    return rows


@triton.jit
def load_readers(ptr, token, left, PARTS: tl.constexpr, ALIGNED: tl.constexpr, TOKENS: tl.constexpr):
    """The rows of B or C of the next TOKENS tokens; the last of `left` again for those past it."""
    rows = ()
    for k in tl.static_range(TOKENS):
        rows = rows + (load_reader(ptr + tl.minimum(k, left - 1) * token, PARTS, ALIGNED),)
    return rows


@triton.jit
def load_rates(A_ptr, starts_ptr, d, here, never, channels, states, PARTS: tl.constexpr):
    """A (D, N) of a block of channels in powers of two, as tiles of states.

    The zeros of a load that never happens make the tiles lie in registers as `starts` does, a lane with all states of
    its channels. As A lies in memory, a lane would get some states of many channels.
    """
    rates = load_states(A_ptr, d, here, 1, states, PARTS)
    lie = load_states(starts_ptr, d, here & never, channels, 1, PARTS)
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (rates[i] * LOG2_E + lie[i],)
    return out


@triton.jit(do_not_specialize=["length", "chunk", "chunks", "zero"])
def chunk_kernel(
    u_ptr,
    u_batch,
    u_token,
    dt_ptr,
    dt_batch,
    dt_token,
    z_ptr,
    z_batch,
    z_token,
    B_ptr,
    B_batch,
    B_token,
    C_ptr,
    C_batch,
    C_token,
    A_ptr,
    bias_ptr,
    skip_ptr,
    starts_ptr,
    sums_ptr,
    y_ptr,
    final_ptr,
    length,
    chunk,
    chunks,
    channels,
    states,
    zero,
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    TOKENS: tl.constexpr,
    B_ALIGNED: tl.constexpr,
    C_ALIGNED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    STARTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of a block of channels of one sequence, by MODE.

    Grid (blocks of channels, chunks, sequences). `starts` (B, chunks, N, D) has the state each chunk starts from, read
    if STARTED. ENDS writes what the chunk makes of a zero state to the next chunk's place there, and the sum of its
    time steps to `sums` (B, chunks, D). OUTPUTS writes `y` (B, L, D), and the last chunk `final` (B, D, N). STATES
    writes all states to `y` (B, L + 1, N, D), those before the first token included.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    across = d + zero * LANE  # the same, but Triton loads no wider vectors of it than of half precision
    part, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = d < channels
    size = channels * states
    rates = load_rates(A_ptr, starts_ptr, across, here, chunk < 0, channels, states, PARTS)
    bias = tl.load(bias_ptr + d, mask=here, other=0.0) if SOFTPLUS else 0.0
    slot = row * chunks + part
    total = tl.zeros((BLOCK,), tl.float32)
    first = part.to(tl.int64) * chunk
    count = tl.minimum(length - part * chunk, chunk)
    u_ptr += row * u_batch + first * u_token
    dt_ptr += row * dt_batch + first * dt_token
    B_ptr += row * B_batch + first * B_token
    C_ptr += row * C_batch + first * C_token
    z_ptr += row * z_batch + first * z_token
    if MODE == OUTPUTS:
        skip = tl.load(skip_ptr + d, mask=here, other=0.0).to(tl.float32)
    us = load_rows(u_ptr, u_token, count, d, channels, TOKENS)
    dts = load_rows(dt_ptr, dt_token, count, d, channels, TOKENS)
    if MODE == OUTPUTS:
        if GATED:
            zs = load_rows(z_ptr, z_token, count, d, channels, TOKENS)
    h = zero_tiles(PARTS, BLOCK)
    if STARTED:
        if OVERLAP:
            gdc_wait()
        h = load_states(starts_ptr + slot * size, across, here, channels, 1, PARTS)
    if MODE == STATES:
        y_ptr += (row * (length + 1) + first) * size
        if part == 0:
            store_states(y_ptr, across, channels, channels, 1, h, PARTS)
    else:
        y_ptr += (row * length + first) * channels
    for start in range(0, count, TOKENS):
        left = count - start
        Bs = load_readers(B_ptr, B_token, left, PARTS, B_ALIGNED, TOKENS)
        B_ptr += TOKENS * B_token
        if MODE == OUTPUTS:
            Cs = load_readers(C_ptr, C_token, left, PARTS, C_ALIGNED, TOKENS)
            C_ptr += TOKENS * C_token
        u_ptr += TOKENS * u_token
        dt_ptr += TOKENS * dt_token
        u_later = load_rows(u_ptr, u_token, left - TOKENS, d, channels, TOKENS)
        dt_later = load_rows(dt_ptr, dt_token, left - TOKENS, d, channels, TOKENS)
        if MODE == OUTPUTS:
            if GATED:
                z_ptr += TOKENS * z_token
                z_later = load_rows(z_ptr, z_token, left - TOKENS, d, channels, TOKENS)
        ys = ()
        for k in tl.static_range(TOKENS):
            u = us[k].to(tl.float32)
            step = time_step(dts[k], bias, SOFTPLUS)
            if SOFTPLUS:
                step = tl.where(k < left, step, 0.0)
            total += step
            h = advance(h, rates, step, step * u, Bs[k], PARTS)
            if MODE == OUTPUTS:
                y = read_out(h, Cs[k], PARTS) + skip * u
                if GATED:
                    y = y * silu(zs[k].to(tl.float32))
                ys = ys + (y.to(y_ptr.dtype.element_ty),)
            if MODE == STATES:
                if k < left:
                    store_states(y_ptr + (k + 1) * size, across, channels, channels, 1, h, PARTS)
        if MODE == OUTPUTS:
            for k in tl.static_range(TOKENS):
                tl.store(y_ptr + k * channels + d, ys[k], mask=here & (k < left))
            y_ptr += TOKENS * channels
            if GATED:
                zs = z_later
        if MODE == STATES:
            y_ptr += TOKENS * size
        us, dts = u_later, dt_later
    if MODE == ENDS:
        tl.store(sums_ptr + slot * channels + d, total, mask=here)
        store_states(starts_ptr + (slot + 1) * size, across, channels, channels, 1, h, PARTS)
    if MODE == OUTPUTS:
        if part == chunks - 1:
            store_states(final_ptr + row * size, d, channels, 1, states, h, PARTS)


@triton.jit
def last_of(tile, COUNT: tl.constexpr):
    """The last row of (COUNT, any). Rows may be in several lanes, where only a sum does not depend on their order."""
    return tl.sum(tl.where((tl.arange(0, COUNT) == COUNT - 1)[:, None], tile, 0.0), axis=0)


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    starts_ptr,
    sums_ptr,
    A_ptr,
    state_ptr,
    chunks,
    channels,
    states,
    CONTINUES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Turn what each chunk makes of a zero state into the state the next one starts from, in place.

    Grid (blocks of N D states, sequences). prod_t exp(dt_t A) = exp(A sum_t dt_t): a chunk's decay needs one number a
    channel. `state` (B, D, N) goes before all, if CONTINUES.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    size = channels * states
    here = i < size
    d, n = i % channels, i // channels
    rate = tl.load(A_ptr + d * states + n, mask=here, other=0.0) * LOG2_E
    if CONTINUES:
        h = tl.load(state_ptr + row * size + d * states + n, mask=here, other=0.0)
    else:
        h = tl.zeros((BLOCK,), tl.float32)
    starts_ptr += row * chunks * size
    sums_ptr += row * chunks * channels
    if OVERLAP:
        gdc_wait()
    tl.store(starts_ptr + i, h, mask=here)
    group = tl.arange(0, GROUP)
    for first in range(0, chunks - 1, GROUP):
        c = (first + group).to(tl.int64)[:, None]
        there = (c < chunks - 1) & here[None, :]
        total = tl.load(sums_ptr + c * channels + d[None, :], mask=there, other=0.0)
        end = tl.load(starts_ptr + (c + 1) * size + i[None, :], mask=there, other=0.0)
        through, made = tl.associative_scan((tl.exp2(total * rate[None, :]), end), 0, chain)
        state = through * h[None, :] + made
        tl.store(starts_ptr + (c + 1) * size + i[None, :], state, mask=there)
        h = last_of(state, GROUP)


def parts_of(states: int) -> tuple[int, ...]:
    """Powers of two that sum to `states`, largest first: the tiles a program keeps its states in."""
    return tuple(1 << i for i in reversed(range(states.bit_length())) if states >> i & 1)


def carried_together(chunks: int) -> int:
    """How many chunks a program of `carry_kernel` takes at a time."""
    return next((group for group in GROUPS if chunks <= group), GROUPS[-1])


def aligned(tensor: torch.Tensor) -> int:
    """Bytes, a power of two up to 16, that divide the address of every row of a tensor."""
    addresses = [tensor.data_ptr(), *(step * tensor.element_size() for step in tensor.stride()[:2])]
    return min((16, *(address & -address for address in addresses if address)))


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A (B, L, D) or (B, L, N) tensor whose last axis lies together, copied only if it must be."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Chunked:
    """A scan cut into chunks: what its kernels are given. Making it finds the state every chunk starts from."""

    def __init__(self, inputs: ScanInputs, state: torch.Tensor | None, plan: Chunks):
        self.inputs, self.plan = inputs, plan
        u, dt, B, C = (rows(t) for t in (inputs.u, inputs.dt, inputs.B, inputs.C))
        z = u if inputs.z is None else rows(inputs.z)
        self.sequences = tuple(x for t in (u, dt, z, B, C) for x in (t, t.stride(0), t.stride(1)))
        self.A = inputs.A.detach().float().contiguous()
        self.bias = dt if inputs.dt_bias is None else inputs.dt_bias.float().contiguous()
        self.chunk = min(plan.chunk, triton.cdiv(max(1, inputs.length), plan.tokens) * plan.tokens)
        self.chunks = max(1, triton.cdiv(inputs.length, self.chunk))
        self.options = {
            "PARTS": parts_of(inputs.d_state),
            "BLOCK": plan.block,
            "LANE": max(1, plan.block // (WARP * plan.warps)),
            "TOKENS": plan.tokens,
            "B_ALIGNED": aligned(B),
            "C_ALIGNED": aligned(C),
            "SOFTPLUS": inputs.dt_bias is not None,
            "num_warps": plan.warps,
            "enable_fp_fusion": True,  # Triton 3.10 will not by itself
            **({"maxnreg": plan.registers} if plan.registers else {}),
        }
        self.overlaps = plan.overlap and self.chunks > 1
        self.after_another = {"OVERLAP": self.overlaps, **({"launch_pdl": True} if self.overlaps else {})}
        self.starts: torch.Tensor | None = None  # (B, chunks, N, D); None: the only chunk starts from zero
        if self.chunks > 1:
            self.starts = self._starts(state)
        elif state is not None:
            self.starts = state.float().transpose(1, 2).contiguous()[:, None]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of channels, chunks, sequences."""
        return triton.cdiv(self.inputs.d_inner, self.plan.block), self.chunks, self.inputs.batch

    def _starts(self, state: torch.Tensor | None) -> torch.Tensor:
        """The state every chunk starts from, (B, chunks, N, D)."""
        inputs, chunks = self.inputs, self.chunks
        shape = (inputs.batch, chunks, inputs.d_state, inputs.d_inner)
        starts = torch.empty(shape, dtype=torch.float32, device=inputs.u.device)
        sums = starts.new_empty(inputs.batch, chunks, inputs.d_inner)
        blocks, _, batch = self.grid
        self.run(ENDS, (blocks, chunks - 1, batch), starts, sums)
        size = inputs.d_state * inputs.d_inner
        group = carried_together(chunks - 1)
        block = CARRIED // group
        carry_kernel[triton.cdiv(size, block), batch](
            *(starts, sums, self.A, starts if state is None else state.float().contiguous()),
            *(chunks, inputs.d_inner, inputs.d_state),
            CONTINUES=state is not None,
            BLOCK=block,
            GROUP=group,
            num_warps=4,
            **self.after_another,
        )
        return starts

    def run(
        self,
        mode: tl.constexpr,
        grid: tuple[int, int, int],
        starts: torch.Tensor | None,
        *written: torch.Tensor,
    ) -> None:
        """Launch `chunk_kernel`; `written` is what the mode writes: sums, or y and the final state, or all states."""
        inputs = self.inputs
        started = mode.value != ENDS.value and starts is not None
        later = self.after_another if started and self.chunks > 1 else {"OVERLAP": self.overlaps}
        starts = self.A if starts is None else starts
        y, other = written[0], written[-1]
        chunk_kernel[grid](
            *self.sequences,
            *(self.A, self.bias, inputs.D.contiguous(), starts, other, y, other),
            *(inputs.length, self.chunk, self.chunks, inputs.d_inner, inputs.d_state, 0),
            MODE=mode.value,
            **self.options,
            GATED=inputs.z is not None,
            STARTED=started,
            **later,
        )


def selective_scan(inputs: ScanInputs, state: torch.Tensor | None, plan: Chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence and read it out; as `reference.selective_scan`, without gradients, for tensors of a GPU."""
    scan = Chunked(inputs, state, plan)
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = y.new_empty(inputs.batch, inputs.d_inner, inputs.d_state, dtype=torch.float32)
    scan.run(OUTPUTS, scan.grid, scan.starts, y, final)
    return y, final


def scan_states(inputs: ScanInputs, state: torch.Tensor | None, plan: Chunks) -> torch.Tensor:
    """All hidden states; as `reference.scan_states`, without gradients, for tensors of a GPU."""
    scan = Chunked(inputs, state, plan)
    shape = (inputs.batch, inputs.length + 1, inputs.d_state, inputs.d_inner)
    states = torch.empty(shape, dtype=torch.float32, device=inputs.u.device)
    scan.run(STATES, scan.grid, scan.starts, states)
    return states
