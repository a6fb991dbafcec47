"""What a GPU is worth here, in one call: 2:4 on sparse tensor cores, compressing, and the report of a pruned model.

    python benchmarks/gpu.py --out gpu-results       # on a machine with a CUDA GPU; some minutes, one table, gpu.json
    python benchmarks/gpu.py --dry-run               # toy sizes on a CPU: shows that it runs, its figures mean nothing

1. `2:4`: in_proj and out_proj at the shapes of Mamba-2.8B (d_model 2560, d_inner 5120), each backend against dense, for
   a prefill of 4096 tokens and for decoding 1 to 256 sequences.
2. `2:4 model`: the prefill and a decoding step of 8 layers of these shapes, dense, and with those modules sparse that
   `use_sparse24` found faster.
3. `compress`: `ssmc compress --pattern column` of 130M shapes with 64 x 2048 tokens, wall time and peak GPU memory.
4. `bench`: `ssmc bench` of 130M shapes with 16 and with 8 states, its own report beside the table.

Weights are random. In 1 every call has other weights than the one before, so that no cache holds them, and the calls
are replayed from a CUDA graph where that can be recorded, so that launching them is not what is timed. Nothing of the
GPU's settings is changed; power limit and clocks are read. The scan alone has a benchmark of its own, gpu_scan.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ssmc.compressor import compress
from ssmc.runtime.bench import benchmark, summary
from ssmc.runtime.bench.graphs import capture
from ssmc.runtime.bench.report import finite
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.timing import Timing, interleave, paired_ratio
from ssmc.runtime.models.checkpoints import write_checkpoint
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.sparse24 import Sparse24Linear, use_sparse24
from ssmc.runtime.sparse24.cuda import first_line, to_sparse, why_dense
from ssmc.runtime.sparse24.use import fault
from ssmc.runtime.tiny import TINY_DIRECTORY

MAMBA = architecture_for("mamba")
COPIES = 4  # of a matrix, used in turns; at 2.8B shapes 4 hold more than the largest cache
STEPS = (1, 8, 64, 256)  # sequences decoded at once


@dataclass(frozen=True)
class Row:
    """One line of the table; `before` and `after` are what `ratio` compares."""

    section: str
    what: str
    before: str = ""
    after: str = ""
    ratio: str = ""
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real sizes."""

    d_model: int = 2560
    layers: int = 8  # of the 2:4 model: enough to see a layer's share, few enough for any GPU
    tokens: int = 4096
    steps: tuple[int, ...] = STEPS
    small_d_model: int = 768
    small_layers: int = 24
    vocab: int = 50280
    nsamples: int = 64
    seqlen: int = 2048
    lengths: tuple[int, ...] = (512, 2048)
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    max_batch: int | None = None
    repeats: int = 15
    budget: float = 120.0


TOY = Sizes(64, 2, 64, (1, 8), 64, 2, 4096, 2, 64, (16,), (1,), 2, 6, 0.5)


def mamba(d_model: int, layers: int, vocab: int, d_state: int = 16) -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": layers, "state_size": d_state}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


@torch.no_grad()
def make_24(linear: nn.Linear) -> nn.Linear:
    """Keep the two largest of every four weights."""
    groups = linear.weight.view(-1, 4)
    lowest = groups.abs().topk(2, dim=1, largest=False).indices
    groups.scatter_(1, lowest, 0)
    return linear


def timed(
    ways: dict[str, list[Callable[[], torch.Tensor]]], device: torch.device, sizes: Sizes, refused: dict[str, str]
) -> tuple[dict[str, Timing], str]:
    """Time the calls of every way one after the other; seconds a call, and what to note.

    A way that does not run goes to `refused`. Unless all can be recorded as CUDA graphs, none is.
    """
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for way, calls in ways.items():
        try:
            runs[way] = in_a_row(calls)
            runs[way]()
        except (RuntimeError, NotImplementedError) as error:
            refused[way] = first_line(error)
            del runs[way]
    note = ""
    if device.type == "cuda":
        try:
            runs = {way: capture(run, device) for way, run in runs.items()}
        except RuntimeError as error:
            note = f"launches included: {first_line(error)}"
    timings = interleave(runs, device, sizes.repeats, sizes.budget / 30)
    return {way: per_call(timing, len(ways[way])) for way, timing in timings.items()}, note


def in_a_row(calls: list[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    @torch.inference_mode()
    def run() -> torch.Tensor:
        return [call() for call in calls][-1]

    return run


def per_call(timing: Timing, count: int) -> Timing:
    return Timing(tuple(seconds / count for seconds in timing.seconds), timing.calls * count)


# --- 1 and 2: 2:4 ----------------------------------------------------------------------------------------------------


def sparse_modules(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[list[Row], dict]:
    """Every backend against dense, per module and number of tokens."""
    d, inner, rows, data = sizes.d_model, 2 * sizes.d_model, [], {}
    for name, (out, features) in {"in_proj": (2 * inner, d), "out_proj": (d, inner)}.items():
        linears = [make_24(nn.Linear(features, out, bias=False, dtype=dtype, device=device)) for _ in range(COPIES)]
        ways, refused = ways_of(linears)
        for tokens in (sizes.tokens, *sizes.steps):
            x = torch.randn(1, tokens, features, device=device).to(dtype)
            calls = {way: [partial(module, x) for module in modules] for way, modules in ways.items()}
            timings, note = timed(calls, device, sizes, refused)
            what = f"{name} {out} x {features}, {tokens} tokens"
            data[what] = {way: timing.seconds for way, timing in timings.items()}
            for way in (way for way in timings if way != "dense"):
                rows.append(replace(compared("2:4", f"{what}, {way}", timings["dense"], timings[way]), note=note))
        rows += [Row("2:4", f"{name}, {backend}", note=f"refused: {why}") for backend, why in refused.items()]
    return rows, data


def ways_of(linears: list[nn.Linear]) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """Way -> the modules to use in turns; and why a backend is none: it does not run, or computes something else."""
    made = [to_sparse(linear.weight.detach()) for linear in linears]
    ways: dict[str, list[nn.Module]] = {"dense": list(linears)}
    refused = dict(made[0][1])
    x = torch.randn(1, 64, linears[0].in_features, device=linears[0].weight.device).to(linears[0].weight)
    for backend in made[0][0]:
        modules = [Sparse24Linear(weights[backend], None) for weights, _ in made]
        with torch.inference_mode():
            wrong = fault(modules[0], x, linears[0](x))
        if wrong is None:
            ways[backend] = modules
        else:
            refused[backend] = wrong
    return ways, refused


def sparse_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[list[Row], dict]:
    """The same model with all modules dense, and with those sparse that `use_sparse24` finds faster."""
    dense = use_fast_scan(mamba(sizes.d_model, sizes.layers, sizes.vocab)).to(device, dtype)
    for block in MAMBA.blocks(dense):
        for name in ("in_proj", "out_proj"):
            make_24(getattr(block.mixer, name))
    sparse = copy.deepcopy(dense)
    report = use_sparse24(sparse, 1, sizes.tokens)
    if report.reason:
        return [Row("2:4 model", "not measured", note=report.reason)], report.to_json()
    note = f"{report.kept} of {len(report.modules)} modules run sparse"
    rows = []
    for what, workload in {
        f"prefill, {sizes.tokens} tokens": lambda model: work.prefill(model, 1, sizes.tokens),
        "decode, batch 1": lambda model: work.decode(model, 1),
    }.items():
        runs = {"dense": workload(dense), "sparse": workload(sparse)}
        timings = interleave(runs, device, sizes.repeats, sizes.budget / 10)
        row = compared("2:4 model", f"{what}, {sizes.layers} layers", timings["dense"], timings["sparse"])
        rows.append(replace(row, note=note))
    return rows, report.to_json()


# --- 3: compress -----------------------------------------------------------------------------------------------------


def compress_on_gpu(sizes: Sizes, device: torch.device, folder: Path) -> tuple[list[Row], dict]:
    """`compress` from files to files, twice: the first run compiles kernels."""
    shapes = f"{sizes.small_layers} layers of d_model {sizes.small_d_model}"
    what = f"column 0.5, {shapes}, {sizes.nsamples} x {sizes.seqlen} tokens"
    rows, data = [], {}
    for number in ("first", "second"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        options = {"nsamples": sizes.nsamples, "seqlen": sizes.seqlen, "device": device.type}
        compress(folder / "dense", out=folder / number, **options)
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        memory = "" if peak is None else f"peak GPU memory {summary.format_bytes(peak)}"
        rows.append(Row("compress", f"{what}, {number} run", after=f"{seconds:.1f} s", note=memory))
        data[number] = {"seconds": seconds, "peak_gpu_bytes": peak}
    return rows, data


# --- 4: bench --------------------------------------------------------------------------------------------------------


def bench_pruned(sizes: Sizes, device: torch.device, folder: Path, out: Path | None) -> tuple[list[Row], dict]:
    """The report of `ssmc bench`, of which the overview becomes rows."""
    report = benchmark(
        models=[folder / "dense", folder / "pruned"],
        lengths=sizes.lengths,
        batch_sizes=sizes.batch_sizes,
        repeats=sizes.repeats,
        time_budget=sizes.budget,
        device=device.type,
        dtype=torch.float16 if device.type == "cuda" else None,
        max_windows=4,
        max_batch=sizes.max_batch,
    )
    if out is not None:
        report.write(out)
    shown = [*summary.summary_rows(report), *summary.sequence_rows(report), *summary.part_rows(report)]
    rows = [Row("bench, 16 and 8 states", r.metric, r.values[0], r.values[1], r.changes[0]) for r in shown]
    return rows, report.to_json()


def write_models(sizes: Sizes, folder: Path) -> None:
    """130M shapes with all states and with half of them, with the embedded tokenizer so that there is text to read."""
    for name, states in (("dense", 16), ("pruned", 8)):
        (folder / name).mkdir()
        model = mamba(sizes.small_d_model, sizes.small_layers, sizes.vocab, states)
        write_checkpoint(
            folder / name, {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, model.config
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(TINY_DIRECTORY) / "tokenizer.json"))
        tokenizer.save_pretrained(folder / name)


# --- the table -------------------------------------------------------------------------------------------------------


def compared(section: str, what: str, before: Timing, after: Timing) -> Row:
    """Interleaved timings."""
    ratio = summary.format_ratio(paired_ratio(before, after))
    return Row(section, what, summary.format_timing(before), summary.format_timing(after), ratio)


@contextmanager
def section(name: str, rows: list[Row]) -> Iterator[None]:
    """One section that fails leaves a row that says so, not a table without the others."""
    print(f"{name} ...", file=sys.stderr)
    try:
        yield
    except (SsmcError, RuntimeError, NotImplementedError) as error:
        rows.append(Row(name, "not measured", note=str(error).split("\n")[0]))


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "what", "dense", "sparse or pruned", "ratio", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.section, row.what, row.before, row.after, row.ratio, row.note)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the 2:4 modules")
    parser.add_argument("--out", type=Path, help="folder for gpu.json, bench.json and bench.html; made if need be")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if not torch.cuda.is_available() and not args.dry_run:
        raise SystemExit(
            "There is no CUDA device here, which everything in this benchmark measures. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or with --dry-run to see that it runs."
        )
    sizes, device, dtype = TOY if args.dry_run else Sizes(), choose_device("auto"), getattr(torch, args.dtype)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    data: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(sizes, folder)
        sections: dict[str, Callable[[], tuple[list[Row], dict]]] = {
            "2:4": lambda: sparse_modules(sizes, device, dtype),
            "2:4 model": lambda: sparse_model(sizes, device, dtype),
            "compress": lambda: compress_on_gpu(sizes, device, folder),
            "bench": lambda: bench_pruned(sizes, device, folder, args.out),
        }
        for what, measure in sections.items():
            with section(what, rows):
                found, data[what] = measure()
                rows += found
    now = conditions(device, dtype, load_average())
    if args.out is not None:
        record = {
            "conditions": asdict(now),
            "sizes": asdict(sizes),
            "rows": [asdict(row) for row in rows],
            "data": data,
        }
        (args.out / "gpu.json").write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
    where = now.cpu if now.gpu is None else f"{now.gpu.name}, power limit {now.gpu.power_limit_w} W"
    if why := why_dense(device, dtype):
        print(why)
    show(rows, f"{'Dry run, toy sizes: these figures mean nothing. ' if args.dry_run else ''}{where}, {args.dtype}")


if __name__ == "__main__":
    main()
