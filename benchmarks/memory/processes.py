"""Two processes that share the samples of a run beside one, with one thread each: time of the whole command.

    python -m benchmarks.memory.processes --out benchmarks/results/processes.json

One process and two take turns. What is timed is the command from its start to its end. To start processes, to load
torch and the model and to write the result is part of it, and no faster with two: that is timed beside it, as the same
command on two samples of 16 tokens. With --ceiling two runs that share nothing, of half the samples each, are timed at
once: what the cores slow each other down, by their common memory and caches, nobody who shares work can get back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.reporting import print_conditions
from ssmc.runtime.measure.conditions import load_average

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(processes: int, out: Path, options: list[str]) -> tuple[float, list[dict]]:
    """Seconds of a run, and what it says of the layers."""
    start = [sys.executable, "-m"]
    start += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    began = time.time()
    command = [*start, "ssmc", "compress", *options, "--out", str(out), "--quiet"]
    subprocess.run(command, env=os.environ | ONE_THREAD, check=True, capture_output=True)
    seconds = time.time() - began
    return seconds, json.loads((out / "ssmc.json").read_text())["layers"]


def slowed_down(work: Path, options: list[str]) -> float:
    """How many times as long a run takes beside another one as alone."""
    alone, _ = run(1, work / "alone", options)
    with ThreadPoolExecutor() as pool:
        beside = list(pool.map(lambda name: run(1, work / name, options)[0], ("left", "right")))
    return max(beside) / alone


def differences(one: list[dict], other: list[dict]) -> tuple[bool, float]:
    """Whether two runs kept the same, and how far their errors are apart, relative to the larger."""
    pairs = list(zip(one, other, strict=True))
    same = all(a[key] == b[key] for a, b in pairs for key in ("kept", "kept_channels"))
    errors = [(a["error"], b["error"]) for a, b in pairs if a["error"]]
    return same, max((abs(a - b) / max(a, b) for a, b in errors), default=0.0)


def main() -> None:
    """Run in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="its last part is its name in the JSON file")
    parser.add_argument("--nsamples", default="64")
    parser.add_argument("--seqlen", default="2048")
    parser.add_argument("--pattern", default="column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ceiling", action="store_true", help="how much two runs that share nothing slow each other")
    parser.add_argument("--out", type=Path, help="JSON file; results of other models and sizes in it stay")
    asked = parser.parse_args()
    now = print_conditions(torch.float32)
    name, options = Path(asked.model).name, [asked.model, "--pattern", asked.pattern]
    size, little = ["--nsamples", asked.nsamples, "--seqlen", asked.seqlen], ["--nsamples", "2", "--seqlen", "16"]
    work = Path(tempfile.mkdtemp())
    seconds: dict[int, list[float]] = {1: [], 2: []}
    starts: dict[int, list[float]] = {1: [], 2: []}
    layers = {}
    try:
        for number in range(asked.rounds):
            for processes in (1, 2):
                started, _ = run(processes, work / f"{processes}-{number}-start", [*options, *little])
                taken, layers[processes] = run(processes, work / f"{processes}-{number}", [*options, *size])
                starts[processes].append(started)
                seconds[processes].append(taken)
                print(
                    f"  {processes} process{'es' if processes > 1 else '  '}: {taken:.1f} s, {started:.1f} s of it "
                    "without samples",
                    flush=True,
                )
        half = [*options, "--nsamples", str(int(asked.nsamples) // 2), "--seqlen", asked.seqlen]
        slower = slowed_down(work, half) if asked.ceiling else None
    finally:
        shutil.rmtree(work)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    working = [[all_of - start for all_of, start in zip(seconds[n], starts[n], strict=True)] for n in (1, 2)]
    of_work = [one / two for one, two in zip(*working, strict=True)]
    same, apart = differences(layers[1], layers[2])
    print(
        f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} .. {max(ratios):.2f}), without the start "
        f"{statistics.median(of_work):.2f} times; {'the same masks' if same else 'OTHER MASKS'}, errors {apart:.1e} "
        "apart"
    )
    if slower is not None:
        print(f"two runs that share nothing take {slower:.2f} times as long beside each other as alone")
    if asked.out is not None:
        record = {"conditions": asdict(now), "load_after": load_average(), "options": [name, *options[1:], *size]}
        record |= {"seconds": seconds, "seconds_of_the_start": starts, "times_as_fast": ratios}
        record |= {"slowed_down_by_a_run_beside": slower}
        record |= {"times_as_fast_without_the_start": of_work, "same_masks": same, "errors_apart": apart}
        known = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
        known |= {f"{name}, {asked.nsamples} x {asked.seqlen}": record}
        asked.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
