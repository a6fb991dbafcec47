"""Find the fastest way to run a scan on the GPU that is here, and keep it for later.

    from ssmc.runtime.scan.gpu.tune import tune
    tune()          # about a minute and a half; `plan_for` uses what it found from then on

Every design and cut is timed for the numbers of channels and states of `WORKS`, from CUDA graphs over several sets of
inputs, so that neither launching nor the cache is what is timed. The fastest of each goes to a JSON file in the user's
cache folder (`plans.stored_path`), under the name of the GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton

from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan.gpu import chunks
from ssmc.runtime.scan.gpu.chunks import Chunks
from ssmc.runtime.scan.gpu.lanes import Lanes
from ssmc.runtime.scan.gpu.plans import MEASURED, Choice, Plan, gpu_of, run, stored_path, write
from ssmc.runtime.scan.inputs import ScanInputs

UNCACHED = 160 << 20  # bytes of inputs that no cache holds
COMPILING = 16  # threads; Triton compiles without Python's lock for the most part
REPLAYS = 7
LANES = (Lanes(4, 4, 16), Lanes(8, 4, 16), Lanes(8, 8, 16, registers=128))
MORE_LANES = tuple(Lanes(channels, warps, 8) for channels, warps in ((4, 4), (8, 8), (16, 8), (16, 16)))
CUTS = (1, 2, 4, 8, 16, 32, 64, 128)  # chunks
MORE_CUTS = (3, 6, 12, 24, 48, 96)
BLOCKS = ((64, 2), (64, 4), (32, 4))  # channels of a program of `Chunks`, and tokens loaded together
FEW_STATES = 4  # leave registers for more tokens in flight
BLOCKS_OF_FEW = ((64, 4), (128, 4), (32, 4), (64, 8), (32, 8))
MORE_BLOCKS = ((128, 8), (64, 16), (32, 16))
OVERLAPPING = (9, 0)  # compute capability from which on kernels may overlap
PROGRAMS = (500, 7000)  # of `Chunks` that are worth trying


@dataclass(frozen=True)
class Work:
    """A scan that is timed."""

    d_inner: int
    batch: int
    states: int

    @property
    def channels(self) -> int:
        """Of all sequences."""
        return self.d_inner * self.batch


WORKS = tuple(
    Work(d_inner, batch, states)
    for d_inner, batch in ((1536, 1), (5120, 1), (1536, 8), (5120, 8))
    for states in (16, 8, 4, 2, 12)
)


@dataclass(frozen=True)
class Timed:
    """One way to do a work, and what it takes."""

    work: Work
    plan: Plan
    microseconds: float


def tune(
    seconds: float = 100.0,
    works: Sequence[Work] = WORKS,
    dtype: torch.dtype = torch.bfloat16,
    thorough: bool = True,
) -> list[Choice]:
    """Time all designs and cuts on the current GPU, store the fastest of each work, return them.

    Args:
        seconds: after which nothing more is timed; what was timed until then is stored.
        works: what is timed, most important first.
        dtype: of the sequences.
        thorough: try what is rarely fastest, too.

    Raises:
        UsageError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UsageError("There is no CUDA device to tune the scan for. Without one, nothing needs to be tuned.")
    device = torch.device("cuda", torch.cuda.current_device())
    found = fastest(list(timings(device, seconds, works, dtype, thorough)))
    write(stored_path(), gpu_of(torch.empty(0, device=device))[0], found)
    return found


def fastest(timed: Sequence[Timed]) -> list[Choice]:
    """The fastest plan of each work, in the order of the works."""
    best: dict[Work, Timed] = {}
    for each in timed:
        if each.work not in best or each.microseconds < best[each.work].microseconds:
            best[each.work] = each
    return [Choice(w.channels, w.states, t.plan, round(t.microseconds, 2)) for w, t in best.items()]


@torch.no_grad()
def timings(
    device: torch.device,
    seconds: float,
    works: Sequence[Work] = WORKS,
    dtype: torch.dtype = torch.bfloat16,
    thorough: bool = True,
) -> Iterator[Timed]:
    """The time of every candidate for every work, as long as there are seconds left."""
    end = time.monotonic() + seconds
    overlap = may_overlap(device)
    size = None
    for work in works:
        if (work.d_inner, work.batch) != size:  # what the works of a size need is compiled together
            size = (work.d_inner, work.batch)
            together = [(w, p) for w in works if (w.d_inner, w.batch) == size for p in candidates(w, thorough, overlap)]
            compile_all(device, together, dtype, end)
        if time.monotonic() > end:
            return
        first = random_inputs(work.batch, MEASURED, work.d_inner, work.states, dtype, device)
        count = max(1, min(12, UNCACHED // (4 * first.u.nbytes)))
        shape = (work.batch, MEASURED, work.d_inner, work.states, dtype, device)
        sets = [first, *(random_inputs(*shape, seed=seed) for seed in range(1, count))]
        for plan in candidates(work, thorough, overlap):
            if time.monotonic() > end:
                return
            seconds_each = seconds_of(lambda i, p=plan: run(i, plan=p), sets)
            yield Timed(work, plan, 1e6 * seconds_each)


def candidates(work: Work, thorough: bool = True, overlap: bool = False) -> list[Plan]:
    """The plans worth trying for a work; `overlap`: on a GPU whose kernels may."""
    plans: list[Plan] = [] if work.states > 64 else [*LANES, *(MORE_LANES if thorough else ())]
    blocks = BLOCKS_OF_FEW if work.states <= FEW_STATES else BLOCKS
    if thorough and work.states <= 2 * FEW_STATES:
        blocks = (*blocks, *MORE_BLOCKS) if work.states <= FEW_STATES else (*blocks, (64, 8), (32, 8))
    for block, tokens in blocks:
        programs = work.batch * triton.cdiv(work.d_inner, block)
        for cut in sorted((*CUTS, *MORE_CUTS) if thorough else CUTS):
            if PROGRAMS[0] <= programs * cut <= PROGRAMS[1]:
                chunk = triton.cdiv(MEASURED, cut * tokens) * tokens
                plans.append(Chunks(block, 1, tokens, chunk, overlap=overlap and cut > 1))
                if thorough and 8 < work.states < 16 and tokens == 4:
                    plans.append(replace(plans[-1], registers=168))  # one program more on a multiprocessor
                if thorough and overlap and cut > 1 and (block, tokens) in BLOCKS[:2]:
                    plans.append(replace(plans[-1], overlap=False))
    return plans


def may_overlap(device: torch.device) -> bool:
    """Whether kernels of a GPU may start before those before them have ended."""
    return torch.cuda.get_device_capability(device) >= OVERLAPPING


def compile_all(device: torch.device, pairs: Sequence[tuple[Work, Plan]], dtype: torch.dtype, end: float) -> None:
    """Compile what the plans need, several kernels at once, by running each once."""
    jobs = {}
    for work, plan in pairs:
        key: object = plan
        if isinstance(plan, Chunks):  # one pass or two, and what adds up so many chunks
            carried = triton.cdiv(MEASURED, plan.chunk) - 1
            group = chunks.carried_together(carried) if carried else 0
            key = (replace(plan, chunk=0), group, work.states)
        jobs.setdefault(key, (work, plan))

    def job(work: Work, plan: Plan) -> None:
        if time.monotonic() > end:
            return
        with torch.no_grad(), suppress(RuntimeError):  # what cannot be compiled says so when it is timed
            run(random_inputs(1, MEASURED, work.d_inner, work.states, dtype, device), plan=plan)

    with ThreadPoolExecutor(COMPILING) as pool:
        list(pool.map(lambda each: job(*each), jobs.values()))
    torch.cuda.synchronize(device)


def seconds_of(call: Callable[[ScanInputs], object], sets: Sequence[ScanInputs]) -> float:
    """Seconds of one call, from a CUDA graph that calls it with each of the inputs in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kept = [call(inputs) for inputs in sets]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(inputs) for inputs in sets]
    spans = []
    for _ in range(REPLAYS):
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        finish.record()
        finish.synchronize()
        spans.append(begin.elapsed_time(finish) / 1e3 / len(sets))
    del kept  # what the graph writes and the sets it reads lived until here
    return statistics.median(spans[1:])


def random_inputs(
    batch: int, length: int, d_inner: int, d_state: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> ScanInputs:
    """What a real layer hands to the scan: z, B and C are slices of wider projections, dt is before softplus."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    rank = max(1, d_inner // 32)
    low_rank = normal(batch, length, rank + 2 * d_state).to(dtype)
    return ScanInputs(
        u=F.silu(normal(batch, length, d_inner)).to(dtype),
        dt=normal(batch, length, d_inner).to(dtype),
        A=-torch.exp(0.5 * normal(d_inner, d_state)) * torch.arange(1, d_state + 1, device=device),
        B=low_rank[..., rank : rank + d_state],
        C=low_rank[..., rank + d_state :],
        D=torch.ones(d_inner, device=device, dtype=dtype),
        z=normal(batch, length, 2 * d_inner).to(dtype)[..., d_inner:],
        dt_bias=normal(d_inner) - 4,
    )
