"""What refinement buys: excess loss on held-out text, and CPU time, by pattern and number of steps, as table and JSON.

    python -m benchmarks.loss.refine  # the embedded model and its texts
    python -m benchmarks.loss.refine MODEL --calib train.jsonl --text valid.jsonl
    python -m benchmarks.loss.refine --cells column:0.875 --steps 300  # some cells only; the JSON keeps the others

"Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over non-overlapping windows. The
first row is what the refined models are to be compared with: half of the states gone by the score ghost, no repair.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

CELLS = ("column:0.875", "column:0.75", "column:0.5", "channel:0.25", "channel:0.5", "column+channel:0.5")
GHOST = {"pattern": "column", "sparsity": 0.5, "score": "ghost", "repair": False}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--cells", nargs="*", default=CELLS, help="PATTERN:SPARSITY")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 50, 150, 300])
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32 * 1024, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/refine.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    report = {
        "model": str(args.model),
        "settings": settings(args),
        "conditions": asdict(print_conditions()),
        "rows": [],
    }
    report["rows"] = earlier_rows(args.json, report)
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    tokens = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed).tokens
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    report |= {"dense_perplexity": dense.ppl, "heldout_tokens": dense.tokens}
    for options in wanted(args):
        model = copy.deepcopy(checkpoint.model)
        config = configure(model=args.model, seed=args.seed, nsamples=args.nsamples, seqlen=args.seqlen, **options)
        start, busy = time.perf_counter(), time.process_time()
        layers = pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes).layers
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        result = perplexity(model, text, args.window)
        row = {"options": options, "seconds": seconds, "cpu_seconds": busy, "perplexity": result.ppl}
        row |= {"excess_nats": result.nll_per_token - dense.nll_per_token}
        row |= {"layers": [None if layer.refined is None else asdict(layer.refined) for layer in layers]}
        report["rows"] = [other for other in report["rows"] if other["options"] != options] + [row]
        print(f"{options}: excess {row['excess_nats']:.4f}, {seconds:.0f} s, {busy:.0f} s of CPU time", flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("nsamples", "seqlen", "window", "max_tokens", "seed")}


def earlier_rows(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a run with the same settings: those are kept."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == report[name] for name in ("model", "settings"))
    return earlier["rows"] if same else []


def wanted(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The options of every run."""
    if 0 in args.steps:
        yield GHOST
    for cell in args.cells:
        pattern, sparsity = cell.split(":")
        for steps in args.steps:
            yield {"pattern": pattern, "sparsity": float(sparsity), "refine": steps}


def print_table(report: dict[str, Any]) -> None:
    refined = [row for row in report["rows"] if row["options"] != GHOST]
    steps = sorted({row["options"]["refine"] for row in refined})
    table = Table(title=f"{report['model']}: excess nats (CPU seconds); dense {report['dense_perplexity']:.3f}")
    table.add_column("removed")
    for count in steps:
        table.add_column("repair" if count == 0 else f"+ {count} steps", justify="right")
    for row in report["rows"]:
        if row["options"] == GHOST:
            table.add_row("ghost without repair, states 50 %", f"{row['excess_nats']:.4f} ({row['cpu_seconds']:.0f})")
    cells = dict.fromkeys((row["options"]["pattern"], row["options"]["sparsity"]) for row in refined)
    for pattern, sparsity in cells:
        found = {
            row["options"]["refine"]: f"{row['excess_nats']:.4f} ({row['cpu_seconds']:.0f})"
            for row in refined
            if (row["options"]["pattern"], row["options"]["sparsity"]) == (pattern, sparsity)
        }
        table.add_row(f"{pattern} {sparsity:.1%}", *(found.get(count, "") for count in steps))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
