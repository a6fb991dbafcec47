"""How long a whole run of `ssmc compress` takes on a checkpoint of 130M shapes, and how much memory it needs.

    python -m benchmarks.speed.pipeline  # 24 layers, 64 samples of 2048 tokens: an hour
    python -m benchmarks.speed.pipeline --layers 4 --samples 16 32 64  # does the time grow faster than the samples?

Every run is a process of its own that reads a checkpoint with random weights, calibrates on the embedded stories (their
tokens mean nothing to it, the work is the same), prunes, and writes the artefact. Seconds are the wall's, from the call
of `ssmc.compress` to its return. Peak memory is the process's resident set, beside what the weights and the layer
inputs (samples x tokens x d_model) take in float32, which it must hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from benchmarks.reporting import print_conditions, write_json
from benchmarks.speed.compress_speed import shapes_130m
from ssmc.compressor import compress
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.models.tokenizers import copy_tokenizer
from ssmc.runtime.tiny import TINY_DIRECTORY

RUNS = {
    "column": {"pattern": "column"},
    "column + channel": {"pattern": "column+channel"},
    "ffn: SparseGPT": {"pattern": "unstructured", "scope": "ffn"},
    "column + ffn: SparseGPT": {"pattern": "column", "scope": "all"},
    "2:4, ffn: SparseGPT": {"pattern": "2:4"},
}
LENGTH = 2048


def write_source(folder: Path, layers: int) -> None:
    model = shapes_130m(layers)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_checkpoint(folder, tensors, model.config)
    copy_tokenizer(Path(TINY_DIRECTORY), folder)


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(run: str, source: str, samples: int) -> None:
    """One run in this process: its seconds and its peak memory, printed as JSON."""
    checkpoint = load_checkpoint(source)
    held = sum(p.numel() for p in checkpoint.model.parameters()) * 4
    held += samples * LENGTH * checkpoint.dimensions.d_model * 4
    del checkpoint
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compress(source, out=Path(folder) / "out", nsamples=samples, seqlen=LENGTH, **RUNS[run])
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "weights_and_inputs_bytes": held}))


def measure(run: str, source: Path, samples: int, layers: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.pipeline",
        "--child",
        run,
        "--source",
        str(source),
        "--samples",
        str(samples),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds_per_sample_and_layer": found["seconds"] / samples / layers}


def row(run: str, samples: int, found: dict[str, float]) -> str:
    peak, held = found["peak_bytes"] / 2**30, found["weights_and_inputs_bytes"] / 2**30
    return (
        f"{run:26} {samples:8} {found['seconds']:9.0f} s {found['seconds_per_sample_and_layer']:18.3f} s "
        f"{peak:8.2f} GiB {held:14.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, nargs="+", default=[64])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.source, args.samples[0])
    now, results = print_conditions(), {}
    print(f"130M shapes, {args.layers} layers, samples of {LENGTH} tokens")
    print(f"{'':26} {'samples':>8} {'wall':>11} {'a sample and layer':>20} {'peak':>12} {'weights+inputs':>18}")
    with tempfile.TemporaryDirectory() as folder:
        write_source(Path(folder), args.layers)
        todo = [(run, samples) for samples in args.samples for run in args.runs]
        for run, samples in track(todo, "compressing", transient=True):
            results[f"{run}, {samples}"] = found = measure(run, Path(folder), samples, args.layers)
            print(row(run, samples, found), flush=True)
    write_json(args.json, now, {"layers": args.layers, "length": LENGTH, "runs": RUNS}, results)


if __name__ == "__main__":
    main()
