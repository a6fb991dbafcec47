"""The scan of Mamba-1 on a GPU: our designs against their bytes and against mamba-ssm, one section a call.

    python benchmarks/gpu_scan.py --section tune --json tune.json --seconds 90   # every design and cut, the best stored
    python benchmarks/gpu_scan.py --section scan --json scan.json --seconds 75   # on a machine with a CUDA GPU
    python benchmarks/gpu_scan.py --section scan --dry-run                       # toy sizes, in Triton's interpreter

- `scan`: a short `tune` unless one has been stored, then prefill at the shapes of Mamba 130M and 2.8B, batch 1 and 8.
  `floor` is the time the bytes alone take (u, dt, z, B, C read once, y and the state written once) at the bandwidth
  of a large copy, bytes read and written counted. mamba-ssm gets its tensors in its own layout, time last, and makes no
  copies.
- `tune`: what `ssmc.runtime.scan.gpu.tune` times, every figure of it.
- `gradients`: forward and backward against mamba-ssm's, with the memory they take.
- `sums`: what calibration needs, from registers, against the states written to memory and summed by torch.
- `token`: the state update of one token.   - `conv`: the convolution before the scan.

Before it is timed, every kernel is compared with the plain torch reference on the same inputs. Kernels run from CUDA
graphs over several sets of inputs, so that neither launching them nor the cache is what is timed; a graph keeps what
it reads. The contenders take turns; medians. The JSON is written anew with every row, most important rows first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from ssmc.runtime.errors import SsmcError
from ssmc.runtime.files import finite
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.timing import Timing, interleave, paired_ratio
from ssmc.runtime.scan import ScanInputs, accelerator, mamba_ssm_scan, reference
from ssmc.runtime.scan.moments import moments_of_states

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # ||difference|| / ||reference||


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real sizes."""

    works: tuple[tuple[str, int, int], ...] = (
        ("130M", 1536, 1),
        ("2.8B", 5120, 1),
        ("130M", 1536, 8),
        ("2.8B", 5120, 8),
    )  # name, d_inner, batch
    states: tuple[int, ...] = (16, 12, 8, 4, 2)
    length: int = 2048
    decoded: tuple[int, ...] = (1, 64, 256)
    calibration: int = 8  # samples
    copied: int = 1 << 30  # bytes
    cache: int = 160 << 20  # bytes of inputs that no cache holds
    repeats: int = 15
    budget: float = 0.3  # seconds a comparison


TOY = Sizes((("toy", 3, 1),), (3, 2), 5, (2,), 1, 1 << 20, 0, 2, 0.1)


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds."""

    section: str
    what: str
    ours: float | None = None
    floor: float | None = None
    against: str = ""  # what else was timed, and how many times ours is as fast
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Where, how and until when to measure."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    bandwidth: float  # bytes a second
    end: float  # of the time there is, by time.monotonic()

    def time(self, ways: dict[str, Callable[[], object]], calls: int = 1) -> dict[str, Timing]:
        """Seconds per call of each way; `calls` of them are one run of it."""
        timings = interleave(ways, self.device, self.sizes.repeats, self.sizes.budget)
        return {name: replace(t, seconds=tuple(s / calls for s in t.seconds)) for name, t in timings.items()}

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


# --- inputs and checks -----------------------------------------------------------------------------------------------


def input_sets(bench: Bench, gpu: ModuleType, batch: int, d_inner: int, d_state: int) -> list[ScanInputs]:
    """Several inputs, together more than a cache holds."""
    options = (bench.sizes.length, d_inner, d_state, bench.dtype, bench.device)
    first = gpu.tune.random_inputs(batch, *options)
    count = max(1, min(12, math.ceil(bench.sizes.cache / (4 * first.u.nbytes))))
    return [first, *(gpu.tune.random_inputs(batch, *options, seed=seed) for seed in range(1, count))]


def error_of(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check(what: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    """Fail unless the two agree."""
    error = error_of(got, wanted)
    if not error < bound:  # NaN never is
        raise RuntimeError(f"wrong result: {what} differs from the reference by {error:.1e} in norm")


def scan_bytes(inputs: ScanInputs) -> int:
    """What a scan must move: every input read once, output and state written once."""
    sequences = [inputs.u, inputs.dt, inputs.z, inputs.u, inputs.B, inputs.C]  # y is as large as u
    state = 4 * inputs.batch * inputs.d_inner * inputs.d_state
    return sum(t.numel() * t.element_size() for t in sequences) + inputs.A.nbytes + state


def in_turns(bench: Bench, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All calls after another, from one CUDA graph where there is a GPU; it keeps alive what they read."""

    def run() -> list[object]:
        return [call() for call in calls]

    if bench.device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()

    def replay() -> object:
        graph.replay()
        return calls, written

    return replay


def bandwidth(sizes: Sizes, device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device, sizes.repeats, sizes.budget)["copy"]
    return 2 * sizes.copied / timing.median


def has_mamba_ssm() -> str | None:
    """Why mamba-ssm's kernels are not there, or None."""
    try:
        mamba_ssm_scan.kernels()
    except Exception as error:  # whatever a package with CUDA kernels raises
        return f"{type(error).__name__}: {error}"
    return None


# --- sections --------------------------------------------------------------------------------------------------------


def scans(bench: Bench) -> Iterator[Row]:
    """Prefill scans by the plan that tuning finds, beside mamba-ssm; ratios to the first number of states.

    A wrong result is told in its row and stops nothing: the others are worth their time.
    """
    gpu = triton(bench)
    missing = has_mamba_ssm()
    if missing is not None:
        yield Row("scan", "mamba-ssm", note=f"not there: {missing}")
    if not gpu.plans.stored_path().is_file():
        left = bench.end - time.monotonic()
        yield from tuned(replace(bench, end=bench.end - 0.5 * left), thorough=False)
    most: float | None = None
    for name, d_inner, batch in bench.sizes.works:
        for d_state in bench.sizes.states:
            if bench.over:
                return
            sets = input_sets(bench, gpu, batch, d_inner, d_state)
            wanted, wanted_state = reference.selective_scan(sets[0].with_time_steps())
            y, state = gpu.selective_scan(sets[0])
            errors = {"ours": max(error_of(y, wanted) / BOUND[bench.dtype], error_of(state, wanted_state) / 1e-4)}
            ways = {"ours": in_turns(bench, [lambda i=i: gpu.selective_scan(i) for i in sets])}
            if missing is None:
                calls = [in_its_layout(i) for i in sets]
                errors["mamba-ssm"] = error_of(calls[0]()[0].transpose(1, 2), wanted) / BOUND[bench.dtype]
                ways["mamba-ssm"] = in_turns(bench, calls)
            timings = bench.time(ways, len(sets))
            ours, *others = timings.items()
            most = ours[1].median if d_state == bench.sizes.states[0] else most
            against = [] if most is None else [f"N = {bench.sizes.states[0]} {most / ours[1].median:.2f}x"]
            against += [f"{way} {1e6 * t.median:.1f} us {faster(t, ours[1])}" for way, t in others]
            wrong = [f"WRONG RESULT of {way}: {e:.1f} times the bound" for way, e in errors.items() if not e < 1]
            plan = str(gpu.plan_for(sets[0]))
            note = "; ".join([plan, f"errors of {max(errors.values()):.2f} of the bound", *wrong])
            what = f"{name}, N = {d_state}, {batch} x {bench.sizes.length} tokens"
            floor = scan_bytes(sets[0]) / bench.bandwidth
            yield Row("scan", what, ours[1].median, floor, ", ".join(against), note)


def gradients(bench: Bench) -> Iterator[Row]:
    """Forward and backward of one sequence, launched from Python, with the memory they take at most."""
    gpu = triton(bench)
    missing = has_mamba_ssm()
    for name, d_inner, batch in bench.sizes.works[:2]:
        for d_state in bench.sizes.states[:3:2]:
            if bench.over:
                return
            options = (d_inner, d_state, bench.dtype, bench.device)
            wrong = gradient_error(gpu, gpu.tune.random_inputs(1, min(256, bench.sizes.length), *options))
            inputs = gpu.tune.random_inputs(batch, bench.sizes.length, *options)
            ways = {"ours": backward_of(inputs, lambda i: gpu.selective_scan(i)[0])}
            against = "mamba-ssm is not there" if missing else ""
            if missing is None:
                theirs = backward_of(turned(inputs), in_turned_layout)
                try:
                    theirs()
                    ways["mamba-ssm"] = theirs
                except RuntimeError as error:  # a build without it
                    against = f"mamba-ssm: {str(error).splitlines()[0]}"
            timings = bench.time(ways)
            if "mamba-ssm" in ways:
                against = f"mamba-ssm {faster(timings['mamba-ssm'], timings['ours'])}"
            with torch.no_grad():
                forward = peaks(bench, {"forward alone": lambda i=inputs: gpu.selective_scan(i)})
            read = sum(t.nbytes for t in vars(inputs).values() if t is not None)
            parts = (f"errors of {wrong:.2f} of the bound", f"inputs {read / 2**20:.0f} MiB", forward)
            note = "; ".join(filter(None, (*parts, peaks(bench, ways), kernels_alone(bench, ways))))
            what = f"gradients, {name}, N = {d_state}, {batch} x {bench.sizes.length} tokens"
            yield Row("gradients", what, timings["ours"].median, None, against, note)


def kernels_alone(bench: Bench, ways: dict[str, Callable[[], object]]) -> str:
    """The time that kernels take of each way, without what launching them from Python takes."""
    if bench.device.type != "cuda":
        return ""
    found = []
    for name, run in ways.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        kernels = [event.device_time_total for event in seen.key_averages()]
        found.append(f"{name} {sum(kernels):.0f} us")
    return "kernels alone " + ", ".join(found)


def backward_of(inputs: ScanInputs, scan: Callable[[ScanInputs], torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of a scan for everything it reads."""
    leaves = {name: t.detach().requires_grad_() for name, t in vars(inputs).items() if t is not None}
    weight = torch.ones_like(inputs.u)

    def run() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(scan(ScanInputs(**leaves)), list(leaves.values()), weight)

    return run


def gradient_error(gpu: ModuleType, inputs: ScanInputs) -> float:
    """The largest error of a gradient in norm, over the bound, against autograd through the reference in float32."""
    rough = backward_of(inputs, lambda i: gpu.selective_scan(i)[0])()
    single = ScanInputs(**{name: t if t is None else t.float() for name, t in vars(inputs).items()})
    exact = backward_of(single, lambda i: reference.selective_scan(i.with_time_steps())[0])()
    return max(error_of(a, b) for a, b in zip(rough, exact, strict=True)) / BOUND[inputs.u.dtype]


def turned(inputs: ScanInputs) -> ScanInputs:
    """The same sequences with time last, as mamba-ssm wants them."""
    names = ("u", "dt", "B", "C", "z")
    return replace(inputs, **{name: getattr(inputs, name).transpose(1, 2).contiguous() for name in names})


def in_turned_layout(i: ScanInputs) -> torch.Tensor:
    """mamba-ssm's scan of what `turned` gives."""
    scan, _ = mamba_ssm_scan.kernels()
    return scan(i.u, i.dt, i.A, i.B, i.C, i.D.float(), z=i.z, delta_bias=i.dt_bias.float(), delta_softplus=True)


def in_its_layout(inputs: ScanInputs) -> Callable[[], object]:
    """mamba-ssm's scan on tensors that lie as it wants them: (B, D, L), time together."""
    scan, _ = mamba_ssm_scan.kernels()
    u, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z))
    bias, D = inputs.dt_bias.float(), inputs.D.float()
    return lambda: scan(u, dt, inputs.A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)


def tuned(bench: Bench, thorough: bool = True) -> Iterator[Row]:
    """Every design and cut; the fastest of each work is stored for this machine, and comes again at the end."""
    gpu = triton(bench)
    if bench.device.type != "cuda":
        yield Row("tune", "nothing to time", note="no CUDA device")
        return
    found = []
    seconds = bench.end - time.monotonic() - 1
    for timed in gpu.tune.timings(bench.device, seconds, dtype=bench.dtype, thorough=thorough):
        found.append(timed)
        what = f"{timed.work.d_inner} channels, N = {timed.work.states}, batch {timed.work.batch}"
        yield Row("tune", what, timed.microseconds / 1e6, note=str(timed.plan))
    best = gpu.tune.fastest(found)
    gpu.plans.write(gpu.plans.stored_path(), gpu.gpu_of(torch.empty(0, device=bench.device))[0], best)
    for choice in best:
        what = f"best for {choice.channels} channels, N = {choice.states}"
        yield Row("tune", what, choice.microseconds / 1e6, note=str(choice.plan))


def tokens(bench: Bench) -> Iterator[Row]:
    """One token of every sequence, the state updated in place."""
    gpu = triton(bench)
    missing = has_mamba_ssm()
    for name, d_inner in dict.fromkeys(work[:2] for work in bench.sizes.works):
        for d_state in bench.sizes.states[:3]:
            for batch in bench.sizes.decoded:
                if bench.over:
                    return
                inputs = gpu.tune.random_inputs(batch, 1, d_inner, d_state, bench.dtype, bench.device)
                state_bytes = 4 * batch * d_inner * d_state
                count = max(1, min(32, math.ceil(bench.sizes.cache / state_bytes)))
                states = [torch.randn(batch, d_inner, d_state, device=bench.device) for _ in range(count)]
                wanted, _ = reference.selective_scan(inputs.with_time_steps(), states[0])
                check("a token's output", gpu.selective_scan(inputs, states[0])[0], wanted, BOUND[bench.dtype])
                ways = {"ours": [lambda s=s, i=inputs: gpu.selective_scan(i, s, in_place=True) for s in states]}
                if missing is None:
                    ways["mamba-ssm"] = [
                        lambda s=s, i=inputs: mamba_ssm_scan.selective_scan(i, s, in_place=True) for s in states
                    ]
                timings = bench.time({way: in_turns(bench, calls) for way, calls in ways.items()}, count)
                against = f"mamba-ssm {faster(timings['mamba-ssm'], timings['ours'])}" if missing is None else ""
                floor = (scan_bytes(inputs) + state_bytes) / bench.bandwidth
                yield Row("token", f"{name}, N = {d_state}, batch {batch}", timings["ours"].median, floor, against)


def convolutions(bench: Bench) -> Iterator[Row]:
    """The causal convolution with silu, against torch's."""
    gpu = triton(bench)
    for name, d_inner in dict.fromkeys(work[:2] for work in bench.sizes.works):
        shape = (1, bench.sizes.length, 2 * d_inner)
        wide = [torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(4 if bench.sizes.cache else 1)]
        weight = torch.randn(d_inner, 1, 4, device=bench.device).to(bench.dtype)
        bias = torch.randn(d_inner, device=bench.device).to(bench.dtype)

        def torch_conv(x: torch.Tensor, w: torch.Tensor = weight, b: torch.Tensor = bias) -> torch.Tensor:
            return F.silu(F.conv1d(x.transpose(1, 2), w, b, padding=3, groups=len(b))[..., : x.shape[1]])

        xs = [x[..., :d_inner] for x in wide]
        got = gpu.causal_conv_silu(xs[0], weight, bias)
        wanted = torch_conv(xs[0].float(), weight.float(), bias.float()).transpose(1, 2)
        check("the convolution", got, wanted, BOUND[bench.dtype])
        ways = {
            "ours": [lambda x=x, w=weight, b=bias: gpu.causal_conv_silu(x, w, b) for x in xs],
            "torch": [lambda x=x: torch_conv(x) for x in xs],
        }
        timings = bench.time({way: in_turns(bench, calls) for way, calls in ways.items()}, len(xs))
        floor = 2 * xs[0].numel() * xs[0].element_size() / bench.bandwidth
        ratio = faster(timings["torch"], timings["ours"])
        yield Row("conv", f"{name}, 1 x {bench.sizes.length} tokens", timings["ours"].median, floor, f"torch {ratio}")


def sums(bench: Bench) -> Iterator[Row]:
    """Calibration of one layer of the smallest shapes: sums from registers against states from memory."""
    gpu = triton(bench)
    name, d_inner, _ = bench.sizes.works[0]
    d_state = bench.sizes.states[0]
    options = (bench.sizes.length, d_inner, d_state, bench.dtype, bench.device)
    inputs = gpu.tune.random_inputs(bench.sizes.calibration, *options)
    got, wanted = gpu.scan_moments(inputs), moments_of_states(inputs, scan_states=gpu.scan_states)
    for what in ("before", "after", "readouts", "quartic"):
        check(f"the sums `{what}`", getattr(got, what), getattr(wanted, what), 1e-4)
    ways = {
        "ours": lambda: gpu.scan_moments(inputs),
        "states": lambda: moments_of_states(inputs, scan_states=gpu.scan_states),
    }
    timings = bench.time(ways)
    what = f"{name}, N = {d_state}, {inputs.batch} x {inputs.length} tokens"
    against = f"states written, then summed by torch {faster(timings['states'], timings['ours'])}"
    yield Row("sums", what, timings["ours"].median, against=against, note=peaks(bench, ways))


def peaks(bench: Bench, ways: dict[str, Callable[[], object]]) -> str:
    """Peak GPU memory of each way above what is there."""
    if bench.device.type != "cuda":
        return ""
    found = []
    for name, run in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        found.append(f"{name} {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB")
    return "peak " + ", ".join(found)


# --- one section -----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "scan": scans,
    "gradients": gradients,
    "tune": tuned,
    "sums": sums,
    "token": tokens,
    "conv": convolutions,
}


def triton(bench: Bench) -> ModuleType:
    """Our kernels, or the sentence that says why they cannot run."""
    module = accelerator("triton", [torch.empty(1, device=bench.device)])
    import ssmc.runtime.scan.gpu.tune  # noqa: F401 (an attribute of the module from here on)

    return module


def faster(other: Timing, ours: Timing) -> str:
    ratio = paired_ratio(other, ours)
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, default="scan")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="where the rows go, written anew with each")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which nothing more is timed")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without a GPU through the interpreter")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.dry_run:
        raise SystemExit(
            "There is no CUDA device here, which everything in this benchmark measures. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or with --dry-run to see that it runs."
        )
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it when it is imported, which has been
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    sizes, device = TOY if args.dry_run else Sizes(), torch.device("cuda" if on_gpu else "cpu")
    end = time.monotonic() + args.seconds
    record: dict[str, object] = {"sizes": asdict(sizes), "rows": []}
    rows: list[Row] = []
    with torch.no_grad():
        bench = Bench(sizes, device, getattr(torch, args.dtype), bandwidth(sizes, device), end)
        record["conditions"] = asdict(conditions(device, bench.dtype, load_average()))
        record["copy_bytes_per_second"] = bench.bandwidth
        write(args.json, record, rows)
        try:
            for row in SECTIONS[args.section](bench):
                rows.append(row)
                say(row)
                write(args.json, record, rows)
        except (SsmcError, RuntimeError) as error:
            write(args.json, record, [*rows, Row(args.section, "stopped", note=str(error).split("\n")[0])])
            raise


def say(row: Row) -> None:
    times = [f"{1e6 * t:.1f} us" for t in (row.ours, row.floor) if t is not None]
    print(row.section, row.what, *times, row.against, row.note, sep=" | ", flush=True)


def write(path: Path | None, record: dict[str, object], rows: list[Row]) -> None:
    if path is not None:
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(finite({**record, "rows": [asdict(row) for row in rows]}), indent=1) + "\n")
        whole.replace(path)


if __name__ == "__main__":
    main()
