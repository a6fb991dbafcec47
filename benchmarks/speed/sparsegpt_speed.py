"""How long SparseGPT takes on one layer of 130M shapes, and what feeding its Hessians costs.

    python -m benchmarks.speed.sparsegpt_speed  # unstructured 50 % and 2:4, every module
    python -m benchmarks.speed.sparsegpt_speed --json out.json

Weights and inputs are random with correlated inputs; the work does not depend on their values. "prune" is one call of
`sparsegpt` (`prune_depthwise` for conv1d) from the finished Hessian: factorisation, sweep and the exact output error.
"prune (plain)" is the published algorithm written with torch as its authors' reference does it, one column of a
row-major weight after the other. "feed" is what one sample of 2048 tokens costs to add. Rounds are interleaved.
On a machine that others use, `--clock cpu` with OMP_NUM_THREADS=1 counts this process's own time instead of the wall's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ssmc.compressor.methods.weights.depthwise import prune_depthwise
from ssmc.compressor.methods.weights.second_moments import DepthwiseSecondMoment, SecondMoment
from ssmc.compressor.methods.weights.sparsegpt import DAMPING, sparsegpt
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.measure.conditions import conditions, load_average

SHAPES = {
    "in_proj": (3072, 768),
    "x_proj": (80, 1536),
    "dt_proj": (1536, 48),
    "out_proj": (768, 1536),
    "conv1d": (1536, 4),
}
SAMPLES, LENGTH = 64, 2048


def plain(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, block: int = 128) -> torch.Tensor:
    """SparseGPT as the paper's Algorithm 1 reads, for comparison."""
    W, H = weight.clone(), hessian.float().clone()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], block):
        here = slice(start, min(start + block, W.shape[1]))
        part, factor = W[:, here].clone(), inverse[here, here]
        errors = torch.zeros_like(part)
        losses = part**2 / factor.diagonal() ** 2
        pruned = losses <= losses.flatten().sort().values[int(losses.numel() * sparsity) - 1]
        for j in range(part.shape[1]):
            column = part[:, j].clone()
            column[pruned[:, j]] = 0
            errors[:, j] = (part[:, j] - column) / factor[j, j]
            part[:, j:] -= errors[:, j : j + 1] @ factor[j : j + 1, j:]
            part[:, j] = column
        W[:, here] = part
        W[:, here.stop :] -= errors @ inverse[here, here.stop :]
    return W


class Job:
    """One module: random weight, random inputs, the Hessian of a few samples."""

    def __init__(self, name: str, shape: tuple[int, int], generator: torch.Generator):
        self.weight = torch.randn(shape, generator=generator)
        if name == "conv1d":
            self.inputs = torch.randn(1, LENGTH, shape[0], generator=generator).cumsum(1)  # (1, L, D)
            self.moment = DepthwiseSecondMoment(*shape)
        else:
            mixing = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
            self.inputs = torch.randn(LENGTH, shape[1], generator=generator) @ (mixing + torch.eye(shape[1]))
            self.moment = SecondMoment(shape[1])
        self.moment.add(self.inputs)
        H = self.moment.total.clone()
        prune = prune_depthwise if name == "conv1d" else sparsegpt
        self.ways: dict[str, Callable[[], object]] = {
            "feed": lambda: self.moment.add(self.inputs),
            "prune 50 %": lambda: prune(self.weight, H, 0.5),
            "prune 2:4": lambda: prune(self.weight, H, NM(2, 4)),
        }
        if name != "conv1d":
            self.ways["prune (plain)"] = lambda: plain(self.weight, H, 0.5)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def measure(repeats: int, clock: Callable[[], float]) -> dict[str, dict[str, list[float]]]:
    generator = torch.Generator().manual_seed(0)
    jobs = {name: Job(name, shape, generator) for name, shape in SHAPES.items()}
    times: dict[str, dict[str, list[float]]] = {name: {way: [] for way in job.ways} for name, job in jobs.items()}
    for round_ in range(repeats + 1):
        for name, job in jobs.items():
            for way, work in job.ways.items():
                taken = seconds(work, clock)
                if round_:  # the first warms up
                    times[name][way].append(taken)
    return times


def cell(milliseconds: list[float]) -> str:
    return f"{statistics.median(milliseconds):.1f} ({min(milliseconds):.1f} to {max(milliseconds):.1f})"


def table(times: dict[str, dict[str, list[float]]]) -> str:
    ways = ["feed", "prune 50 %", "prune 2:4", "prune (plain)"]
    lines = [f"{'ms, median (lowest to highest)':32}" + "".join(f"{way:>26}" for way in ways)]
    for name, by_way in times.items():
        cells = [cell([1000 * t for t in by_way[way]]) if way in by_way else "-" for way in ways]
        lines.append(f"{name + ' ' + str(SHAPES[name]):32}" + "".join(f"{c:>26}" for c in cells))
    feed, prune = (sum(statistics.median(t[way]) for t in times.values()) for way in ("feed", "prune 50 %"))
    dense = {n: t for n, t in times.items() if "prune (plain)" in t}
    ours, theirs = (sum(statistics.median(t[w]) for t in dense.values()) for w in ("prune 50 %", "prune (plain)"))
    lines += [
        f"whole layer: prune {prune:.2f} s, feed {feed:.3f} s a sample; 24 layers and {SAMPLES} samples of {LENGTH}: "
        f"prune {24 * prune:.0f} s, feed {24 * SAMPLES * feed:.0f} s (without running the model)",
        f"plain / ours without conv1d: {theirs / ours:.2f}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = conditions(torch.device("cpu"), torch.float32, load_average())
    print(f"{where.cpu}, {where.torch_threads} threads, load {where.load_average}, {where.versions}, {where.date}")
    print(f"{args.clock} time, median of {args.repeats} interleaved rounds")
    times = measure(args.repeats, CLOCKS[args.clock])
    print(table(times))
    if args.json:
        report = {"conditions": asdict(where), "clock": args.clock, "shapes": SHAPES, "seconds": times}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
