"""Mamba-2's scan on a GPU: our Triton kernels against their bytes, mamba-ssm's and torch's chunked path.

    python -m benchmarks.gpu_ssd                           # a table, and benchmarks/results/gpu_ssd.json
    python -m benchmarks.gpu_ssd --json out.json --seconds 90
    python -m benchmarks.gpu_ssd --only tune               # other ways to cut the scan
    python -m benchmarks.gpu_ssd --dry-run                 # toy sizes, through Triton's interpreter: does it run?

Sections, in order of worth: `prefill` (2048 tokens) and `decode` (one token, state in place) at the shapes of Mamba-2
130M and 2.7B, `rival` (mamba-ssm's prefill), `backward` (gradients, with peak memory), `tune` (other ways to cut the
scan), `more` (prefill of other numbers of states), `norm` (the gated norm). Every row is in the file the moment it is
measured; what the seconds do not suffice for is left out and said. Times are in seconds.

Each row first compares ours with the plain torch reference on fresh random inputs. `first call` includes compiling:
Triton's cache is a fresh folder. Single kernels run from CUDA graphs over several sets of inputs, so that neither
launching them nor the cache is what is timed; a graph keeps its inputs alive. `bytes` is the time the bytes alone take
at the bandwidth of a large copy. mamba-ssm tunes itself for a minute at every new number of states, so its prefill is
timed at the numbers given by --mamba-ssm-states only, and processes of their own compile what it will try meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if not {"--compile-kind", "--compile-rival"} & set(sys.argv):  # one that compiles for another shares its folder
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssmc-triton-")

import torch
import triton
from rich.console import Console
from rich.table import Table

from ssmc.runtime.scan import SsdInputs
from ssmc.runtime.scan import ssd as plain
from ssmc.runtime.scan.gpu import gated_norm, ssd

ROOT = Path(__file__).parent.parent
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # ||difference|| / ||reference||
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A layer of a model."""

    name: str
    d_inner: int
    head_dim: int = 64
    groups: int = 1


@dataclass(frozen=True)
class Bench:
    """What is measured, where, and until when."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float  # bytes a second
    until: float  # of time.monotonic
    rivals: tuple[int, ...]  # numbers of states at which mamba-ssm is timed
    shapes: tuple[Shape, ...] = (Shape("130M", 1536), Shape("2.7B", 5120))
    states: tuple[int, ...] = (128, 64, 16, 32, 96)
    batches: tuple[int, ...] = (1, 8)
    decoded: tuple[int, ...] = (1, 64)
    length: int = 2048
    cache: int = 128 << 20  # bytes of inputs that no cache holds
    rounds: int = 7

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.until


# --- inputs, checks, clocks ------------------------------------------------------------------------------------------


def layer_inputs(bench: Bench, shape: Shape, states: int, batch: int, length: int, seed: int = 0) -> SsdInputs:
    """What a real layer hands to the scan: u, B and C are slices of one tensor, dt is before softplus."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=bench.device)

    heads, readers = shape.d_inner // shape.head_dim, shape.groups * states
    convolved = torch.nn.functional.silu(normal(batch, length, shape.d_inner + 2 * readers)).to(bench.dtype)
    u, B, C = convolved.split([shape.d_inner, readers, readers], dim=-1)
    return SsdInputs(
        u=u,
        dt=normal(batch, length, heads).to(bench.dtype),
        A=-torch.exp(normal(heads)) * 4,
        B=B.unflatten(2, (shape.groups, states)),
        C=C.unflatten(2, (shape.groups, states)),
        D=torch.ones(heads, device=bench.device, dtype=bench.dtype),
        dt_bias=normal(heads) - 4,
    )


def input_sets(bench: Bench, shape: Shape, states: int, batch: int) -> list[SsdInputs]:
    """Several inputs, together more than a cache holds."""
    first = layer_inputs(bench, shape, states, batch, bench.length)
    count = max(1, min(16, math.ceil(bench.cache / (2 * first.u.nbytes))))
    return [first, *(layer_inputs(bench, shape, states, batch, bench.length, seed) for seed in range(1, count))]


def error(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> float:
    """||difference|| / ||wanted||; fails beyond the bound."""
    found = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    if not found < bound:  # NaN never is
        raise RuntimeError(f"wrong result: differs from the reference by {found:.1e} in norm, more than {bound:.0e}")
    return found


class Recorded:
    """Calls one after another from one CUDA graph, where there is a GPU; holds on to all they read."""

    def __init__(self, calls: Sequence[Call], device: torch.device):
        self.calls, self.graph = calls, None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._all()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._all()

    def _all(self) -> None:
        for call in self.calls:
            call()

    def seconds(self, runs: int = 1) -> float:
        """Of one call, on average."""
        run = self._all if self.graph is None else self.graph.replay
        if self.graph is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / len(self.calls)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / runs / len(self.calls)


def timed(bench: Bench, ways: dict[str, Recorded]) -> dict[str, float]:
    """Median seconds a call of each way; the ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.seconds()
    for _ in range(bench.rounds):
        for name, way in ways.items():
            found[name].append(way.seconds(3))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def first_call(bench: Bench, call: Call) -> tuple[object, float]:
    """What a call returns, and the seconds it takes with everything it compiles."""
    start = time.perf_counter()
    result = call()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    size = 1 << 30 if device.type == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Recorded([lambda: target.copy_(source)], device)
    return 2 * size / min(copy.seconds() for _ in range(5))


def peak(bench: Bench, call: Call) -> float:
    """MiB of GPU memory a call takes above what is there."""
    if bench.device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- mamba-ssm -------------------------------------------------------------------------------------------------------


def rival_scan(inputs: SsdInputs) -> Call | None:
    """mamba-ssm's scan of the same tensors, or None without that package."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception:  # whatever a package with CUDA kernels raises
        return None
    u = inputs.u.unflatten(2, (inputs.heads, inputs.head_dim))
    options = {"chunk_size": 256, "D": inputs.D, "dt_bias": inputs.dt_bias, "dt_softplus": True}
    return lambda: mamba_chunk_scan_combined(
        u, inputs.dt, inputs.A, inputs.B, inputs.C, return_final_states=True, **options
    )


def rival_token(inputs: SsdInputs, state: torch.Tensor) -> Call | None:
    """mamba-ssm's state update of the same tensors, or None without that package."""
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except Exception:
        return None
    batch, heads, head_dim, states = state.shape
    u = inputs.u[:, 0].unflatten(1, (heads, head_dim))
    dt = inputs.dt[:, 0, :, None].expand(batch, heads, head_dim)
    A = inputs.A[:, None, None].expand(heads, head_dim, states)
    D, bias = (t[:, None].expand(heads, head_dim) for t in (inputs.D, inputs.dt_bias))
    B, C = inputs.B[:, 0], inputs.C[:, 0]
    return lambda: selective_state_update(state, u, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)


# --- sections --------------------------------------------------------------------------------------------------------


def scan_bytes(inputs: SsdInputs) -> int:
    """What a scan must move: every input read once, output and state written once."""
    read = sum(t.numel() * t.element_size() for t in (inputs.u, inputs.u, inputs.dt, inputs.B, inputs.C))
    return read + 4 * inputs.batch * inputs.d_inner * inputs.d_state


def compared(times: dict[str, float]) -> dict[str, object]:
    """The times as parts of a row, and what the others take in units of ours."""
    others = [f"{name} {seconds / times['ours']:.2f}x" for name, seconds in times.items() if name != "ours"]
    return {**times, "against": ", ".join(others)}


def prefill(bench: Bench) -> Iterator[dict]:
    """Scans of many tokens."""
    yield from prefills(bench, bench.states[:3])


def more(bench: Bench) -> Iterator[dict]:
    """Scans of other numbers of states."""
    yield from prefills(bench, bench.states[3:])


def prefills(bench: Bench, numbers: Sequence[int]) -> Iterator[dict]:
    """Scans of many tokens with each of these numbers of states."""
    for states in numbers:
        for batch in bench.batches:
            for shape in bench.shapes:
                sets = input_sets(bench, shape, states, batch)
                (y, end), seconds = first_call(bench, lambda i=sets[0]: ssd.ssd_scan(i))
                wanted, wanted_end = plain.ssd_scan(sets[0].with_time_steps())
                found = error(y, wanted, BOUND[bench.dtype]), error(end, wanted_end, BOUND[bench.dtype])
                plan = ssd.plan_for(sets[0], ssd.gpu_of(sets[0].u))
                row = {"what": f"{shape.name}, N = {states}, {batch} x {bench.length} tokens", "first_call": seconds}
                row |= {"error": found[0], "state_error": found[1], "plan": str(plan)}
                row["note"] = f"first call {seconds:.1f} s, error {found[0]:.1e}, state {found[1]:.1e}"
                ways = {"ours": Recorded([lambda i=i: ssd.ssd_scan(i) for i in sets], bench.device)}
                if batch == 1 and states == bench.states[0]:
                    torch_path = [lambda i=sets[0]: plain.ssd_scan(i.with_time_steps())]
                    ways["torch"] = Recorded(torch_path, bench.device)
                yield row | compared(timed(bench, ways)) | {"floor": scan_bytes(sets[0]) / bench.bandwidth}


def rival(bench: Bench) -> Iterator[dict]:
    """Prefill against mamba-ssm's, which compiles and tries for a minute first."""
    if bench.until - time.monotonic() < LEAST_RIVAL:
        yield {"what": "mamba-ssm", "note": "too little time was left for it to tune itself"}
        return
    for states in bench.rivals:
        for batch in bench.batches:
            for shape in bench.shapes:
                sets = input_sets(bench, shape, states, batch)
                theirs = [rival_scan(i) for i in sets]
                if None in theirs:
                    yield {"what": "mamba-ssm", "note": "its kernels are not there"}
                    return
                (y, _), seconds = first_call(bench, theirs[0])
                found = error(y.flatten(2), plain.ssd_scan(sets[0].with_time_steps())[0], BOUND[bench.dtype])
                ours = Recorded([lambda i=i: ssd.ssd_scan(i) for i in sets], bench.device)
                row = {"what": f"{shape.name}, N = {states}, {batch} x {bench.length} tokens"}
                row["note"] = f"mamba-ssm's first call {seconds:.1f} s, its error {found:.1e}"
                times = timed(bench, {"ours": ours, "mamba-ssm": Recorded(theirs, bench.device)})
                yield row | compared(times) | {"floor": scan_bytes(sets[0]) / bench.bandwidth}


def decode(bench: Bench) -> Iterator[dict]:
    """One token of every sequence, the state updated in place."""
    for states in (bench.states[0], bench.states[-1]):
        for batch in bench.decoded:
            for shape in bench.shapes:
                inputs = layer_inputs(bench, shape, states, batch, 1)
                size = (batch, inputs.heads, inputs.head_dim, states)
                count = max(1, min(32, math.ceil(bench.cache / (4 * math.prod(size)))))
                kept = [torch.randn(size, device=bench.device) for _ in range(count)]
                (y, _), seconds = first_call(bench, lambda i=inputs, s=kept[0]: ssd.ssd_scan(i, s))
                wanted, _ = plain.ssd_scan(inputs.with_time_steps(), kept[0])
                found = error(y, wanted, BOUND[bench.dtype])
                row = {"what": f"decode, {shape.name}, N = {states}, batch {batch}", "first_call": seconds}
                row |= {"error": found, "note": f"first call {seconds:.1f} s, error {found:.1e}"}
                calls = [lambda s=s, i=inputs: ssd.ssd_scan(i, s, in_place=True) for s in kept]
                ways = {"ours": Recorded(calls, bench.device)}
                if rival_token(inputs, kept[0]) is not None:
                    ways["mamba-ssm"] = Recorded([rival_token(inputs, s) for s in kept], bench.device)
                floor = (scan_bytes(inputs) + kept[0].nbytes) / bench.bandwidth
                yield row | compared(timed(bench, ways)) | {"floor": floor}


def norm(bench: Bench) -> Iterator[dict]:
    """The gated norm, against torch's operations as transformers writes them."""
    for shape in bench.shapes:
        generator = torch.Generator(bench.device).manual_seed(0)
        y, z = (
            torch.randn(1, bench.length, shape.d_inner, generator=generator, device=bench.device).to(bench.dtype)
            for _ in range(2)
        )
        weight = torch.ones(shape.d_inner, device=bench.device, dtype=bench.dtype)

        def stock(y: torch.Tensor = y, z: torch.Tensor = z, weight: torch.Tensor = weight) -> torch.Tensor:
            gated = y.float() * torch.nn.functional.silu(z.float())
            return weight * (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)).to(y.dtype)

        got, seconds = first_call(bench, lambda y=y, z=z, w=weight: gated_norm(y, z, w, 1, 1e-5))
        found = error(got, stock(), BOUND[bench.dtype])
        row = {"what": f"gated norm, {shape.name}, 1 x {bench.length} tokens", "first_call": seconds}
        row["note"] = f"first call {seconds:.1f} s, error {found:.1e}"
        ours = Recorded([lambda y=y, z=z, w=weight: gated_norm(y, z, w, 1, 1e-5)], bench.device)
        times = timed(bench, {"ours": ours, "torch": Recorded([stock], bench.device)})
        yield row | compared(times) | {"floor": 3 * y.nbytes / bench.bandwidth}


RIVAL_COMPILERS = 8
LEAST_RIVAL = 25.0  # seconds
AHEAD = 55.0  # seconds below which what is compiled ahead would not be run
LEAVES = ("u", "dt", "A", "B", "C", "D")


def backward(bench: Bench) -> Iterator[dict]:
    """Forward and gradients, launched from Python as training does, against autograd through torch's chunked path."""
    for batch in bench.batches:
        shape = bench.shapes[0]
        stepped = layer_inputs(bench, shape, bench.states[0], batch, bench.length).with_time_steps()
        leaves = {name: getattr(stepped, name).detach().clone().requires_grad_() for name in LEAVES}
        inputs = replace(stepped, **leaves)
        dy = torch.randn_like(stepped.u)

        def train(scan: Callable, inputs: SsdInputs = inputs, dy: torch.Tensor = dy) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(scan(inputs)[0], [getattr(inputs, name) for name in LEAVES], dy)

        got, seconds = first_call(bench, lambda train=train: train(ssd.ssd_scan))
        wanted = train(plain.ssd_scan)
        errors = {n: error(a, b, 2 * BOUND[bench.dtype]) for n, a, b in zip(LEAVES, got, wanted, strict=True)}
        forward = peak(bench, lambda i=stepped: ssd.ssd_scan(i))
        peaks = {"forward": forward, "ours": peak(bench, lambda train=train: train(ssd.ssd_scan))}
        peaks["torch"] = peak(bench, lambda train=train: train(plain.ssd_scan))
        eager = replace(bench, device=torch.device("cpu"))  # no graph: what autograd launches, as it launches it
        ways = {
            "ours": Recorded([launched(bench, lambda train=train: train(ssd.ssd_scan))], eager.device),
            "forward": Recorded([launched(bench, lambda i=stepped: ssd.ssd_scan(i))], eager.device),
            "torch": Recorded([launched(bench, lambda train=train: train(plain.ssd_scan))], eager.device),
        }
        row = {"what": f"gradients, {shape.name}, N = {stepped.d_state}, {batch} x {bench.length} tokens"}
        row |= {"first_call": seconds, "errors": errors, "peak_mib": peaks}
        note = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in peaks.items())
        row["note"] = f"first call {seconds:.1f} s, largest error {max(errors.values()):.1e}, peak {note}"
        yield row | compared(timed(eager, ways))


def launched(bench: Bench, call: Call) -> Call:
    """The call, and the wait for what it launched."""

    def run() -> None:
        call()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    return run


KINDS = (
    {},
    {"stages": 3},
    {"registers": 168},
    {"stages": 3, "registers": 168},
    {"stages": 2, "registers": None},
    {"widest": 32},
)
TUNED = (128, 64, 32, 16)  # numbers of states


def compile_kind(bench: Bench, number: int) -> None:
    """Compile what `tune` will run, for another process with the same folder of compiled kernels."""
    for states in TUNED:
        given = layer_inputs(bench, bench.shapes[0], states, 1, bench.length)
        chosen = ssd.plan_for(given, ssd.gpu_of(given.u))
        ssd.ssd_scan(given, plan=replace(chosen, stretch=bench.length // 2, **KINDS[number]))


def compile_ahead() -> None:
    """Begin to compile for `tune` in processes of their own, beside the sections before it."""
    for number in range(1, len(KINDS)):
        begin("--compile-kind", number)


def begin(what: str, number: int) -> None:
    """Begin to compile something in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_ssd", what, str(number)]
    subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compile_rival(bench: Bench, number: int) -> None:
    """Compile a share of all that mamba-ssm will try, without running it."""

    def compile_only(self: triton.runtime.Autotuner, *args: object, **kwargs: object) -> None:
        kwargs.pop("warmup", None)
        self.configs = self.configs[number::RIVAL_COMPILERS]
        if self.configs:
            self.warmup(*args, **kwargs)

    triton.runtime.Autotuner.run = compile_only
    for states in bench.rivals:
        for shape in bench.shapes:
            call = rival_scan(layer_inputs(bench, shape, states, 1, bench.length))
            if call is not None:
                call()


def tune(bench: Bench) -> Iterator[dict]:
    """Other ways to cut the scan, against the one chosen; each new kind of program compiles for seconds."""
    for states in TUNED:
        cases = [(shape, batch) for shape in bench.shapes for batch in bench.batches]
        inputs = {case: layer_inputs(bench, case[0], states, case[1], bench.length) for case in cases}
        for kind in KINDS:
            for (shape, batch), given in inputs.items():
                chosen = ssd.plan_for(given, ssd.gpu_of(given.u))
                stretches = sorted({chosen.stretch, *(max(128, bench.length // n) for n in (1, 2, 4, 8, 16))})
                what = f"tune, {shape.name}, N = {states}, batch {batch}, {kind}"
                plans = {stretch: replace(chosen, stretch=stretch, **kind) for stretch in stretches}
                try:
                    ways = {
                        stretch: Recorded([lambda i=given, p=plan: ssd.ssd_scan(i, plan=p)], bench.device)
                        for stretch, plan in plans.items()
                    }
                    times = timed(replace(bench, rounds=5), ways)
                except Exception as why:  # a plan that asks for too much shared memory is a finding
                    yield {"what": what, "note": f"{type(why).__name__}: {why}".split("\n")[0][:200]}
                    continue
                note = ", ".join(f"{stretch}: {1e6 * seconds:.1f}" for stretch, seconds in times.items())
                row = {"what": what, "ours": min(times.values()), "us_by_stretch": times}
                yield row | {"note": f"chosen {chosen.stretch}; us by stretch {note}"}


SECTIONS = {
    "prefill": prefill,
    "decode": decode,
    "rival": rival,
    "backward": backward,
    "tune": tune,
    "more": more,
    "norm": norm,
}


# --- the run ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, only: Sequence[str], keep: Callable[[list[dict]], None]) -> list[dict]:
    """All rows; each is kept the moment it is there, and a section that fails leaves a row that says why."""
    rows: list[dict] = []
    for name in only:
        try:
            if bench.is_over:
                raise TimeoutError("no time was left")
            with torch.no_grad():
                for row in SECTIONS[name](bench):
                    rows.append({"section": name, **row})
                    keep(rows)
                    if bench.is_over:
                        raise TimeoutError("the time was used up here")
        except Exception as why:  # whatever it is, the others shall run
            why = f"{type(why).__name__}: {why}".split("\n")[0][:300]
            rows.append({"section": name, "what": f"{name}: not all measured", "note": why})
            keep(rows)
    return rows


def show(rows: list[dict], title: str) -> None:
    """The table."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "ours", "bytes", "others take", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        times = [f"{1e6 * row[k]:.1f} us" if k in row else "" for k in ("ours", "floor")]
        table.add_row(row["what"], *times, row.get("against", ""), row.get("note", ""))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--json", type=Path, help="where the figures go; benchmarks/results/gpu_ssd.json unless it is a dry run"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no new row is begun")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--mamba-ssm-states", default="128", help="numbers of states, with commas between")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without a GPU through the interpreter")
    parser.add_argument("--compile-kind", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compile-rival", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not args.dry_run
    if not on_gpu and not args.dry_run:
        raise SystemExit("There is no CUDA device here, which this measures. Use --dry-run to see that it runs.")
    unknown = set(args.only.split(",")) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"There is no section {', '.join(sorted(unknown))}: choose of {', '.join(SECTIONS)}.")
    device = torch.device("cuda" if on_gpu else "cpu")
    until = time.monotonic() + args.seconds
    rivals = tuple(int(n) for n in args.mamba_ssm_states.split(",") if n)
    if args.compile_kind is not None or args.compile_rival is not None:
        bench = Bench(device, getattr(torch, args.dtype), 1.0, until, rivals)
        if args.compile_kind is None:
            compile_rival(bench, args.compile_rival)
        else:
            compile_kind(bench, args.compile_kind)
        return
    if on_gpu and args.seconds >= AHEAD and "rival" in args.only.split(","):
        for number in range(RIVAL_COMPILERS):
            begin("--compile-rival", number)
    if on_gpu and args.seconds >= AHEAD and "tune" in args.only.split(","):
        compile_ahead()
    bench = Bench(device, getattr(torch, args.dtype), copy_bandwidth(device), until, rivals)
    if args.dry_run:
        toy = {"shapes": (Shape("toy", 32, 16),), "states": (12, 16), "batches": (1,), "decoded": (2,)}
        bench = replace(bench, **toy, length=140, cache=0, rounds=1)
    name = torch.cuda.get_device_name() if on_gpu else "CPU, interpreted: the figures mean nothing"
    path = args.json or (None if args.dry_run else ROOT / "benchmarks" / "results" / "gpu_ssd.json")
    head = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "dtype": args.dtype}
    head |= {"length": bench.length, "copy_bytes_per_second": bench.bandwidth}

    def keep(rows: list[dict]) -> None:
        if path is not None:
            path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    rows = run(bench, args.only.split(","), keep)
    show(rows, f"{name}, torch {torch.__version__}, triton {triton.__version__}, {args.dtype}, {bench.length} tokens")
    if any("wrong result" in row.get("note", "") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
