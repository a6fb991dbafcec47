"""Every figure of the scan on a GPU in one call: our Triton kernels against their bytes, mamba-ssm and transformers.

    python benchmarks/gpu_scan.py                # on a machine with a CUDA GPU: minutes, a table, docs/gpu_scan.json
    python benchmarks/gpu_scan.py --tune         # also tries other ways to cut the scan, and says which is fastest
    python benchmarks/gpu_scan.py --dry-run      # toy sizes, without a GPU through Triton's interpreter: does it run?

1. `scan`: prefill at the shapes of Mamba 130M, 1.4B and 2.8B. `floor` is the time the bytes alone take (u, dt, z, B, C
   read once, y and the state written once) at the bandwidth of a large copy, bytes read and written counted. mamba-ssm
   gets its tensors in its own layout, time last, and makes no copies of them.
2. `decode`: the state update of one token.   3. `conv`: the convolution before the scan.
4. `sums`: what calibration needs, from registers, against the states written to memory and summed by torch.
5. `model`: prefill and decode of 130M shapes end to end, stock transformers against the same model with our scan.

Before it is timed, every kernel is compared with the plain torch reference on fresh random inputs. Single kernels run
from CUDA graphs over several sets of inputs, so that neither launching them nor the cache is what is timed. The
contenders take turns; medians. Nothing of the GPU's settings is changed; power limit and clocks are read. What was
predicted, and why the kernels are built as they are, is in docs/gpu_scan.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from benchmarks.speed.scan import transformers_scan
from ssmc.runtime.bench.report import finite
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.conditions import Gpu, conditions, load_average
from ssmc.runtime.measure.timing import Timing, interleave, paired_ratio
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, record
from ssmc.runtime.scan import ScanInputs, accelerator, mamba_ssm_scan, reference
from ssmc.runtime.scan.moments import moments_of_states

ROOT = Path(__file__).parent.parent
CACHE = 200 << 20  # bytes of inputs that no cache holds
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # ||difference|| / ||reference||


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real sizes."""

    shapes: tuple[tuple[str, int], ...] = (("130M", 1536), ("1.4B", 4096), ("2.8B", 5120))  # and d_inner
    states: tuple[int, ...] = (16, 12, 8, 4, 2)
    batches: tuple[int, ...] = (1, 8)
    length: int = 2048
    decoded: tuple[int, ...] = (1, 64, 256)
    calibration: int = 8  # samples
    d_model: int = 768
    layers: int = 24
    vocab: int = 50280
    prompt: int = 512  # transformers' loop takes seconds for it
    copied: int = 1 << 30  # bytes
    cache: int = CACHE
    repeats: int = 25
    budget: float = 4.0  # seconds a comparison


TOY = Sizes((("toy", 40),), (3, 2), (1,), 5, (2,), 1, 16, 1, 64, 4, 1 << 20, 0, 2, 0.1)


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
    """Where and how to measure."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    bandwidth: float  # bytes a second

    def time(self, ways: dict[str, Callable[[], object]], calls: int = 1) -> dict[str, Timing]:
        """Seconds per call of each way; `calls` of them are one run of it."""
        timings = interleave(ways, self.device, self.sizes.repeats, self.sizes.budget)
        return {name: replace(t, seconds=tuple(s / calls for s in t.seconds)) for name, t in timings.items()}


# --- inputs and checks -----------------------------------------------------------------------------------------------


def layer_inputs(bench: Bench, batch: int, length: int, d_inner: int, d_state: int, seed: int) -> ScanInputs:
    """What a real layer hands to the scan: z, B and C are slices of wider projections, dt is before softplus."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=bench.device, dtype=torch.float32)

    rank = d_inner // 32
    low_rank = normal(batch, length, rank + 2 * d_state).to(bench.dtype)
    return ScanInputs(
        u=F.silu(normal(batch, length, d_inner)).to(bench.dtype),
        dt=normal(batch, length, d_inner).to(bench.dtype),
        A=-torch.exp(0.5 * normal(d_inner, d_state)) * torch.arange(1, d_state + 1, device=bench.device),
        B=low_rank[..., rank : rank + d_state],
        C=low_rank[..., rank + d_state :],
        D=torch.ones(d_inner, device=bench.device, dtype=bench.dtype),
        z=normal(batch, length, 2 * d_inner).to(bench.dtype)[..., d_inner:],
        dt_bias=normal(d_inner) - 4,
    )


def input_sets(bench: Bench, batch: int, length: int, d_inner: int, d_state: int) -> list[ScanInputs]:
    """Several inputs, together more than a cache holds."""
    first = layer_inputs(bench, batch, length, d_inner, d_state, 0)
    count = max(1, min(16, math.ceil(bench.sizes.cache / (4 * first.u.nbytes))))
    more = (layer_inputs(bench, batch, length, d_inner, d_state, seed) for seed in range(1, count))
    return [first, *more]


def check(what: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    """Fail unless the two agree."""
    error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    if not error < bound:  # NaN never is
        raise RuntimeError(f"wrong result: {what} differs from the reference by {error:.1e} in norm")


def scan_bytes(inputs: ScanInputs) -> int:
    """What a scan must move: every input read once, output and state written once."""
    sequences = [inputs.u, inputs.dt, inputs.z, inputs.u, inputs.B, inputs.C]  # y is as large as u
    state = 4 * inputs.batch * inputs.d_inner * inputs.d_state
    return sum(t.numel() * t.element_size() for t in sequences) + inputs.A.nbytes + state


def in_turns(bench: Bench, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All calls after another, from one CUDA graph where there is a GPU."""

    def run() -> None:
        for call in calls:
            call()

    if bench.device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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


# --- 1: scan ---------------------------------------------------------------------------------------------------------


def scans(bench: Bench) -> Iterator[Row]:
    """Prefill scans, every number of states in turns; ratios to the first number."""
    gpu = triton(bench)
    missing = has_mamba_ssm()
    length, most = bench.sizes.length, bench.sizes.states[0]
    for name, d_inner in bench.sizes.shapes:
        for batch in bench.sizes.batches:
            ways, floors, count = {}, {}, 1
            for d_state in bench.sizes.states:
                sets = input_sets(bench, batch, length, d_inner, d_state)
                y, state = gpu.selective_scan(sets[0])
                wanted, wanted_state = reference.selective_scan(sets[0].with_time_steps())
                check("the scan's output", y, wanted, BOUND[bench.dtype])
                check("the scan's final state", state, wanted_state, 1e-4)
                ways[f"ours {d_state}"] = in_turns(bench, [lambda i=i: gpu.selective_scan(i) for i in sets])
                if missing is None:
                    ways[f"mamba-ssm {d_state}"] = in_turns(bench, [in_its_layout(i) for i in sets])
                floors[d_state], count = scan_bytes(sets[0]) / bench.bandwidth, len(sets)
            timings = bench.time(ways, count)
            for d_state, floor in floors.items():
                ours = timings[f"ours {d_state}"]
                against = [] if d_state == most else [f"N = {most} {faster(timings[f'ours {most}'], ours)}"]
                if missing is None:
                    against.append(f"mamba-ssm {faster(timings[f'mamba-ssm {d_state}'], ours)}")
                what = f"{name}, N = {d_state}, {batch} x {length} tokens"
                yield Row("scan", what, ours.median, floor, ", ".join(against))
    if missing is not None:
        yield Row("scan", "mamba-ssm", note=f"not there: {missing}")


def in_its_layout(inputs: ScanInputs) -> Callable[[], object]:
    """mamba-ssm's scan on tensors that lie as it wants them: (B, D, L), time together."""
    scan, _ = mamba_ssm_scan.kernels()
    u, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z))
    bias, D = inputs.dt_bias.float(), inputs.D.float()
    return lambda: scan(u, dt, inputs.A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)


def stock_scan(bench: Bench) -> Iterator[Row]:
    """transformers' own loop over tokens, once: it takes a thousand times as long."""
    gpu = triton(bench)
    name, d_inner = bench.sizes.shapes[0]
    inputs = layer_inputs(bench, 1, bench.sizes.length, d_inner, bench.sizes.states[0], 0)
    stepped = inputs.with_time_steps()
    timings = bench.time(
        {"ours": lambda: gpu.selective_scan(inputs), "transformers": lambda: transformers_scan(stepped)}
    )
    what = f"{name}, N = {inputs.d_state}, 1 x {bench.sizes.length} tokens, launched from Python"
    ratio = faster(timings["transformers"], timings["ours"])
    yield Row("scan", what, timings["ours"].median, against=f"transformers' loop {ratio}")


def tuned(bench: Bench) -> Iterator[Row]:
    """The fastest way to cut each scan, of many, against the one chosen."""
    gpu = triton(bench)
    for name, d_inner in bench.sizes.shapes:
        for d_state in bench.sizes.states[:4]:
            for batch in bench.sizes.batches:
                inputs = layer_inputs(bench, batch, bench.sizes.length, d_inner, d_state, 0)
                default = gpu.plan_for(inputs, gpu.prefill.multiprocessors(inputs.u))
                plans = {default} | {
                    gpu.Plan(32 * lane, 1, tokens, max(tokens, bench.sizes.length // chunks // tokens * tokens))
                    for lane in (1, 2, 4)
                    for tokens in (1, 2, 4, 8)
                    for chunks in (1, 4, 8, 12, 16, 24, 32, 64)
                }
                seconds = {}
                for plan in plans:
                    run = in_turns(bench, [lambda p=plan, i=inputs: gpu.selective_scan(i, plan=p)])
                    seconds[plan] = interleave({"": run}, bench.device, 5, 0.05)[""].median
                best = min(seconds, key=seconds.get)
                ratio = seconds[default] / seconds[best]
                what = f"{name}, N = {d_state}, {batch} x {bench.sizes.length} tokens"
                yield Row("tune", what, seconds[best], against=f"default {ratio:.2f}x", note=str(best))


# --- 2 to 4: decode, convolution, sums -------------------------------------------------------------------------------


def tokens(bench: Bench) -> Iterator[Row]:
    """One token of every sequence, the state updated in place."""
    gpu = triton(bench)
    missing = has_mamba_ssm()
    for name, d_inner in bench.sizes.shapes:
        for d_state in bench.sizes.states[:3]:
            for batch in bench.sizes.decoded:
                inputs = layer_inputs(bench, batch, 1, d_inner, d_state, 0)
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
                what = f"{name}, N = {d_state}, batch {batch}"
                yield Row("decode", what, timings["ours"].median, floor, against)


def convolutions(bench: Bench) -> Iterator[Row]:
    """The causal convolution with silu, against torch's."""
    gpu = triton(bench)
    for name, d_inner in bench.sizes.shapes:
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
    name, d_inner = bench.sizes.shapes[0]
    inputs = layer_inputs(bench, bench.sizes.calibration, bench.sizes.length, d_inner, bench.sizes.states[0], 0)
    got, wanted = gpu.scan_moments(inputs), moments_of_states(inputs, scan_states=gpu.scan_states)
    for what in ("before", "after", "readouts", "quartic"):
        check(f"the sums `{what}`", getattr(got, what), getattr(wanted, what), 1e-4)
    ways = {
        "ours": lambda: gpu.scan_moments(inputs),
        "states": lambda: moments_of_states(inputs, scan_states=gpu.scan_states),
    }
    timings = bench.time(ways)
    ratio = faster(timings["states"], timings["ours"])
    what = f"{name}, N = {inputs.d_state}, {inputs.batch} x {inputs.length} tokens"
    against = f"states written, then summed by torch {ratio}"
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


# --- 5: model --------------------------------------------------------------------------------------------------------


def models(bench: Bench) -> Iterator[Row]:
    """End to end, launched from Python as users do; decoding also from a CUDA graph."""
    torch.manual_seed(0)
    sizes = bench.sizes
    config = MambaConfig(vocab_size=sizes.vocab, hidden_size=sizes.d_model, num_hidden_layers=sizes.layers)
    model = MambaForCausalLM(config).eval().to(bench.device, bench.dtype)
    switch = {"stock": lambda: use_stock_scan(model), "ours": lambda: use_fast_scan(model, "triton")}
    if has_mamba_ssm() is None:
        switch["mamba-ssm"] = lambda: use_fast_scan(model, "mamba-ssm")
    for what, make in workloads(model, sizes).items():
        runs = {}
        for name, use in switch.items():
            use()
            runs[name] = make()
        timings = interleave(runs, bench.device, sizes.repeats, 10 * sizes.budget, prepare=switch)
        against = [f"{name} {faster(timings[name], timings['ours'])}" for name in runs if name != "ours"]
        yield Row("model", what, timings["ours"].median, against=", ".join(against))
    switch["ours"]()
    yield from recorded(bench, model)


def workloads(model: nn.Module, sizes: Sizes) -> dict[str, Callable[[], Callable[[], object]]]:
    """What is run, by name."""
    return {
        f"prefill, 1 x {sizes.prompt} tokens": lambda: work.prefill(model, 1, sizes.prompt),
        "decode, batch 1": lambda: work.decode(model, 1),
        f"decode, batch {sizes.decoded[-1]}": lambda: work.decode(model, sizes.decoded[-1]),
    }


def recorded(bench: Bench, model: nn.Module) -> Iterator[Row]:
    """A decoding step with our scan, from a CUDA graph."""
    for batch in (1, bench.sizes.decoded[-1]):
        what = f"decode, batch {batch}, from a CUDA graph"
        try:
            run = record(work.decoding(model, batch), bench.device)
        except NotRecordable as why:
            yield Row("model", what, note=f"not recorded: {why}")
            continue
        timing = interleave({"": run}, bench.device, bench.sizes.repeats, bench.sizes.budget)[""]
        yield Row("model", what, timing.median)


# --- the table -------------------------------------------------------------------------------------------------------


def triton(bench: Bench) -> ModuleType:
    """Our kernels, or the sentence that says why they cannot run."""
    return accelerator("triton", [torch.empty(1, device=bench.device)])


def faster(other: Timing, ours: Timing) -> str:
    ratio = paired_ratio(other, ours)
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


@contextmanager
def section(name: str, rows: list[Row]) -> Iterator[None]:
    """One section that fails leaves a row that says so, not a table without the others."""
    print(f"{name} ...", file=sys.stderr)
    try:
        yield
    except (SsmcError, RuntimeError) as error:
        rows.append(Row(name, "stopped", note=str(error).split("\n")[0]))


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "what", "time", "floor", "time / floor", "takes, times as long", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        time, floor = (None if t is None else f"{1e6 * t:.1f} us" for t in (row.ours, row.floor))
        share = "" if row.ours is None or row.floor is None else f"{row.ours / row.floor:.2f}"
        table.add_row(row.section, row.what, time, floor, share, row.against, row.note)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tune", action="store_true", help="try other ways to cut the scan: some minutes more")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without a GPU through the interpreter")
    parser.add_argument("--json", type=Path, help="where the figures go; docs/gpu_scan.json unless it is a dry run")
    args = parser.parse_args()
    logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.dry_run:
        raise SystemExit(
            "There is no CUDA device here, which everything in this benchmark measures. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or with --dry-run to see that it runs."
        )
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it when it is imported, which has been
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    sizes, device = TOY if args.dry_run else Sizes(), torch.device("cuda" if on_gpu else "cpu")
    rows: list[Row] = []
    with torch.inference_mode():
        bench = Bench(sizes, device, getattr(torch, args.dtype), bandwidth(sizes, device))
        measured = [scans, stock_scan, tokens, convolutions, sums, models, *([tuned] if args.tune else [])]
        for measure in measured:
            with section(measure.__name__, rows):
                rows.extend(measure(bench))
    now = conditions(device, bench.dtype, load_average())
    path = args.json or (None if args.dry_run else ROOT / "docs" / "gpu_scan.json")
    if path is not None:
        record = {"conditions": asdict(now), "sizes": asdict(sizes), "copy_bytes_per_second": bench.bandwidth}
        record["rows"] = [asdict(row) for row in rows]
        path.write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
    where = now.cpu if now.gpu is None else f"{now.gpu.name}, power limit {now.gpu.power_limit_w} W, {clocks(now.gpu)}"
    software = ", ".join(f"{name} {version}" for name, version in now.versions.items())
    title = "Dry run, toy sizes: these figures mean nothing. " if args.dry_run else ""
    show(rows, f"{title}{where}, copy {bench.bandwidth / 1e9:.0f} GB/s, {args.dtype}, {software}")


def clocks(gpu: Gpu) -> str:
    return f"SM {gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz, memory {gpu.memory_clock_mhz} MHz"


if __name__ == "__main__":
    main()
