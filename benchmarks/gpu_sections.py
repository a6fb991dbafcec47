"""The sections of gpu.py that have no benchmark of their own; each run is one section, in a process of its own.

    python -m benchmarks.gpu_sections --section decode --json decode.json --seconds 45
    python -m benchmarks.gpu_sections --section "2:4" --dry-run

The JSON is written anew with every row, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.gpu_common import TOY, Row, Sizes, mamba
from benchmarks.gpu_sparse24 import sparse_model, sparse_modules
from ssmc.runtime.bench import benchmark, summary
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.files import finite
from ssmc.runtime.measure import workloads as work
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.timing import Timing, interleave
from ssmc.runtime.models.checkpoints import write_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, record
from ssmc.runtime.models.generation.sampling import Sampling
from ssmc.runtime.models.generation.torch_session import TorchSession
from ssmc.runtime.models.generation.writing import stream_tokens
from ssmc.runtime.models.memory import format_bytes
from ssmc.runtime.tiny import TINY_DIRECTORY

# --- decode ----------------------------------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A token of a 22 M Mamba at every batch size: launched from Python, from a CUDA graph, as a session, by others."""
    shapes = f"d_model {sizes.decode_d_model}, {sizes.decode_layers} layers"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = use_fast_scan(mamba(sizes.decode_d_model, sizes.decode_layers, sizes.decode_vocab)).to(device, dtype)
    for batch in sizes.decode_batches:
        step = work.decoding(model, batch)
        runs = {"launched from Python": step.run}
        note = ""
        try:
            runs["from a CUDA graph"] = record(work.decoding(model, batch), device)
        except NotRecordable as why:
            note = f"no graph: {why}"
        timings = interleave(runs, device, sizes.repeats, sizes.budget / 60)
        launched, *replayed = timings.values()
        if replayed:
            yield _row(f"{shapes}, batch {batch}: Python, graph", launched, replayed[0], note)
        else:
            yield Row(f"{shapes}, batch {batch}: Python", summary.format_timing(launched), note=note)
        for how, sampling in {"greedy": Sampling(), "drawn": Sampling(temperature=0.8, top_p=0.95)}.items():
            with_session = seconds_a_token(TorchSession(model), batch, sizes.decode_tokens, sampling)
            yield Row(f"{shapes}, batch {batch}: a session, {how}", after=f"{1e3 * with_session:.3f} ms")
        if device.type == "cuda" and batch == min(sizes.decode_batches):
            yield from launched_kernels(model, batch)
    for batch in sizes.decode_batches:  # its kernels take long to compile
        yield from mamba_ssm_decode(sizes, device, dtype, batch)
    for state_dtype in ("float16", "int8"):
        use_fast_scan(model, state_dtype=state_dtype)
        for batch in sizes.decode_batches:
            seconds = seconds_a_token(TorchSession(model), batch, sizes.decode_tokens)
            yield Row(f"{shapes}, batch {batch}: a session, states in {state_dtype}", after=f"{1e3 * seconds:.3f} ms")


def _row(what: str, before: Timing, after: Timing, note: str = "") -> Row:
    ratio = f"{before.median / after.median:.2f}x"
    return Row(what, summary.format_timing(before), summary.format_timing(after), ratio, note)


def seconds_a_token(session: TorchSession, batch: int, tokens: int, sampling: Sampling | None = None) -> float:
    """Seconds a token of decoding, greedily by default, as `ssmc generate` does it: the median after the first ten."""
    prompts = [[1 + row % 7] * 8 for row in range(batch)]
    found = []
    for _ in range(2):  # the first run records the graph
        rows = stream_tokens(session, prompts, sampling, max_new_tokens=tokens)
        next(rows)
        found = []
        while True:
            begin = time.perf_counter()
            if next(rows, None) is None:
                break
            found.append(time.perf_counter() - begin)
    return statistics.median(found[min(10, len(found) // 2) :])


def mamba_ssm_decode(sizes: Sizes, device: torch.device, dtype: torch.dtype, batch: int) -> Iterator[Row]:
    """mamba_ssm's own model of the same size, through its own generate with a CUDA graph."""
    what = f"mamba_ssm's generate with a CUDA graph, batch {batch}"
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = MambaConfig(d_model=sizes.decode_d_model, n_layer=sizes.decode_layers, vocab_size=sizes.decode_vocab)
        model = MambaLMHeadModel(config, device=device, dtype=dtype)
        prompt = torch.ones(batch, 8, dtype=torch.long, device=device)

        def run(tokens: int) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model.generate(prompt, max_length=8 + tokens, top_k=1, cg=True)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        run(sizes.decode_tokens)
        few, many = run(sizes.decode_tokens // 4), run(sizes.decode_tokens)
        seconds = (many - few) / (sizes.decode_tokens - sizes.decode_tokens // 4)
        yield Row(what, before=f"{1e3 * seconds:.3f} ms")
    except Exception as error:  # whatever a package with CUDA kernels raises
        yield Row(
            what, note=f"not measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )


def launched_kernels(model: nn.Module, batch: int) -> Iterator[Row]:
    """Which kernels a step runs, most time first: what there is to save."""
    from torch.profiler import ProfilerActivity, profile

    step = work.decoding(model, batch)
    step.run()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step.run()
        torch.cuda.synchronize()
    kernels = [event for event in seen.key_averages() if event.device_time_total > 0]
    total = sum(event.device_time_total for event in kernels)
    count = sum(event.count for event in kernels)
    yield Row(f"kernels of a step, batch {batch}", after=f"{total:.0f} us", note=f"{count} kernels")
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:14]:
        yield Row(f"  {event.key[:80]}", after=f"{event.device_time_total:.0f} us", note=f"{event.count} times")


# --- compress --------------------------------------------------------------------------------------------------------

COMMAND = """
import sys, threading, time, traceback
def watch():  # where the main thread is every two seconds, for the log
    while True:
        time.sleep(2)
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        print(*(f"{f.name}:{f.lineno}" for f in frames[-6:]), file=sys.stderr, flush=True)
threading.Thread(target=watch, daemon=True).start()
begin = time.perf_counter()
from ssmc.cli import main
code = main(sys.argv[1:])
seconds = time.perf_counter() - begin
import torch
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print("MEASURED", seconds, peak)
sys.exit(code)
"""
IMPORTS = {"torch": "import torch", "torch and transformers": "from transformers import MambaForCausalLM"}
IMPORTS |= {"all of compress": "import ssmc.compressor as c; c.compress, c.prune"}
IMPORTS |= {"torch, first use of CUDA": "import torch; torch.cuda.is_available() and torch.ones(1, device='cuda')"}


def compress_command(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """`ssmc compress` from files to files, wall-clock time of the whole process; the first run compiles kernels."""
    shapes = f"{sizes.small_layers} layers of d_model {sizes.small_d_model}"
    what = f"column 0.5, {shapes}, {sizes.nsamples} x {sizes.seqlen} tokens"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(sizes, folder, {"dense": 16}, device)
        for number in ("first run", "second run"):
            options = ("--nsamples", sizes.nsamples, "--seqlen", sizes.seqlen)
            yield _compressed(f"{what}, {number}", folder, device, options)


def start_up(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """How long a command takes before it has anything to do: what it imports, and a compress of next to nothing."""
    for what, statement in IMPORTS.items():
        for number in ("first", "second"):
            begin = time.perf_counter()
            code = subprocess.run([sys.executable, "-c", statement], check=False).returncode
            note = f"exit code {code}" if code else ""
            yield Row(f"{what}, {number} process", after=f"{time.perf_counter() - begin:.1f} s", note=note)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(sizes, folder, {"dense": 16}, device)
        for number in ("first", "second", "third"):
            options = ("--nsamples", 1, "--seqlen", 16)
            yield _compressed(f"compress, 1 x 16 tokens, {number} command", folder, device, options)


def _compress(folder: Path, device: torch.device, options: tuple[object, ...]) -> list[str]:
    out = ["--out", str(folder / "out"), "--force", "--quiet"]
    return ["compress", str(folder / "dense"), "--device", device.type, *map(str, options), *out]


def _compressed(what: str, folder: Path, device: torch.device, options: tuple[object, ...]) -> Row:
    begin = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, *_compress(folder, device, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=False)
    seconds = time.perf_counter() - begin
    measured = [line.split() for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not measured:
        return Row(what, note=f"exit code {done.returncode}, see the log of this section")
    note = f"peak GPU memory {format_bytes(int(measured[0][2]))}" if device.type == "cuda" else ""
    return Row(what, after=f"{seconds:.1f} s", note=note)


# --- every command ---------------------------------------------------------------------------------------------------

LINES = (
    "compress tiny --nsamples 8 --seqlen 256",
    "export --format safetensors",
    "export --format mamba-ssm",
    "export --format onnx",
    "eval ssmc-out --text text.txt",
    "generate ssmc-out Once --max-new-tokens 32",
    "bench --time-budget 5 --lengths 256 --batch-sizes 1 --window 256 --max-windows 2",
    "compress tiny-mamba2 --nsamples 8 --seqlen 256 --out second",
    "export second",
    "generate second Once --max-new-tokens 32",
)


THEIRS = """
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
import ssmc
theirs = MambaLMHeadModel.from_pretrained("ssmc-out/mamba-ssm", device="cuda", dtype=torch.float32).eval()
ours, _ = ssmc.load("ssmc-out/safetensors", dtype=torch.float32)
tokens = torch.randint(ours.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    wanted = ours(tokens).logits
    got = theirs(tokens.cuda()).logits.cpu()[..., : wanted.shape[-1]]
print("largest difference of a logit, relative:", float((got - wanted).abs().max() / wanted.abs().max()))
"""


def every_command(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The commands as a user types them, on the embedded models; with mamba_ssm beside them where it is installed."""
    beside = [name for name in ("mamba_ssm", "causal_conv1d") if find_spec(name) is not None]
    yield Row("installed beside ssmc", after=", ".join(beside) or "neither mamba_ssm nor causal_conv1d")
    ssmc = [sys.executable, "-c", "import sys; from ssmc.cli import main; sys.exit(main(sys.argv[1:]))"]
    runs = {f"ssmc {line}": [*ssmc, *line.split()] for line in LINES}
    if "mamba_ssm" in beside and device.type == "cuda":
        runs["mamba_ssm itself loads ssmc-out/mamba-ssm"] = [sys.executable, "-c", THEIRS]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("Once upon a time there was a bear. " * 200, encoding="utf-8")
        for what, command in runs.items():
            begin = time.perf_counter()
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            said = (done.stderr if done.returncode else done.stdout if command[2] == THEIRS else "").strip()
            note = f"exit code {done.returncode}: " if done.returncode else ""
            yield Row(what, after=f"{time.perf_counter() - begin:.1f} s", note=note + (said.splitlines() or [""])[-1])


# --- refine and bench ------------------------------------------------------------------------------------------------


def refine(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Gradient steps on every layer of 130M shapes: seconds a layer and step, from a run with and one without."""
    tokens = ("--nsamples", max(2, sizes.nsamples // 8), "--seqlen", sizes.seqlen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = replace(sizes, small_layers=min(sizes.small_layers, 3))
        write_models(few, folder, {"dense": 16}, device)
        shapes = f"{few.small_layers} layers of d_model {few.small_d_model}, {tokens[1]} x {tokens[3]} tokens"
        for steps in (0, sizes.refine_steps):
            yield _compressed(f"{shapes}, refine {steps}", folder, device, (*tokens, "--refine", steps))


def bench(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The report of `ssmc bench`, of which the overview becomes rows: first of little, then of more."""
    small, all_of_it = (sizes.lengths[:1], sizes.batch_sizes[:1]), (sizes.lengths, sizes.batch_sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(sizes, folder, {"dense": 16, "pruned": 8}, device)
        for (lengths, batch_sizes), max_batch in ((small, 0), (all_of_it, 0), (small, sizes.max_batch)):
            report = benchmark(
                models=[folder / "dense", folder / "pruned"],
                lengths=lengths,
                batch_sizes=batch_sizes,
                repeats=sizes.repeats,
                time_budget=sizes.budget / 8,
                device=device.type,
                dtype=torch.float16 if device.type == "cuda" else None,
                max_windows=2,
                max_batch=max_batch,
                progress=lambda what, done, total: print(f"{what}: {done} of {total}", file=sys.stderr, flush=True),
            )
            shown = [*summary.summary_rows(report), *summary.sequence_rows(report), *summary.part_rows(report)]
            for r in shown:
                yield Row(f"16 and 8 states: {r.metric}", r.values[0], r.values[1], r.changes[0])
            yield from (Row("note", note=note) for note in report.notes)


def write_models(sizes: Sizes, folder: Path, states: dict[str, int], device: torch.device) -> None:
    """130M shapes with so many states each, with the embedded tokenizer so that there is text to read."""
    for name, d_state in states.items():
        (folder / name).mkdir()
        with device:  # random numbers come fast there
            model = mamba(sizes.small_d_model, sizes.small_layers, sizes.vocab, d_state).cpu()
        write_checkpoint(
            folder / name, {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, model.config
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(TINY_DIRECTORY) / "tokenizer.json"))
        tokenizer.save_pretrained(folder / name)


# --- one section -----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Sizes, torch.device], Iterator[Row]]] = {
    "decode": decode,
    "compress": compress_command,
    "start-up": start_up,
    "commands": every_command,
    "2:4": sparse_modules,
    "2:4 model": sparse_model,
    "refine": refine,
    "bench": bench,
}


def write(path: Path | None, rows: list[Row], now: dict) -> None:
    if path is not None:
        record = {"conditions": now, "rows": [asdict(row) for row in rows]}
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
        whole.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", required=True, choices=SECTIONS)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--seconds", type=float, default=120.0, help="that are left for it")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    args = parser.parse_args()
    logging.set_verbosity_error()
    sizes = TOY if args.dry_run else replace(Sizes(), budget=args.seconds)
    device = choose_device("auto")
    now = asdict(conditions(device, torch.bfloat16, load_average()))
    rows: list[Row] = []
    write(args.json, rows, now)
    try:
        for row in SECTIONS[args.section](sizes, device):
            rows.append(row)
            print(*(part for part in asdict(row).values() if part), sep=" | ", flush=True)
            write(args.json, rows, now)
    except (SsmcError, RuntimeError, NotImplementedError) as error:
        write(args.json, [*rows, Row("stopped", note=str(error).split("\n")[0])], now)
        raise


if __name__ == "__main__":
    main()
