"""Models made smaller along several axes, beside Minitron's score without repair at the same sizes.

    python -m benchmarks.loss.axes                                     # tiny-hybrid, a quarter of its parameters gone
    python -m benchmarks.loss.axes tiny --out benchmarks/results/axes_tiny.json
    python -m benchmarks.loss.axes MODEL --calib train.jsonl --text valid.jsonl --sizes head=0.5,mlp=0.5 --seeds 0 1 2

Each line of sizes is compressed as by default, with half of the states gone besides where they are whole, by `--score
minitron --no-repair`, and exported. A line that is one number is a goal, `--target-params`, with those patterns that
follow it ("0.75:layer+column"). No weight is trained. "Excess" is the mean negative log-likelihood of the export
above the dense model's, in nats a token, over windows of held-out text, as the mean over calibration samples of
several seeds; parameters are those of the export. Minitron's score knows no states: where some go, they are those of
the score `exact`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import print_conditions
from ssmc.compressor import compress
from ssmc.compressor.options.patterns import parse_values
from ssmc.exporters import export
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

SIZES = {
    "tiny-hybrid": (
        "head=0.333333,mlp=0.72,attention=0.666667",
        "column=0.5,head=0.166667,mlp=0.74,attention=0.833333",
        "width=0.25",
    ),
    "tiny": ("0.75", "0.75:layer+column+channel", "column=0.5,width=0.25"),
    "tiny-mamba2": ("0.75:layer+column", "head-dim=0.1875,width=0.1875"),
}
"""A quarter of the parameters, without width and with it: embedding and head, 41 % of tiny-hybrid, only width cuts."""

WAYS: dict[str, dict[str, Any]] = {
    "ssmc": {},
    "ssmc, half of the states on top": {"states": 0.5},
    "minitron, no repair": {"score": "minitron", "repair": False},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-hybrid")
    parser.add_argument("--sizes", nargs="+", help="axis=share that goes, with commas between; or a goal")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="those to measure")
    parser.add_argument("--merge", nargs="+", type=Path, help="do not run: put these JSON files of parts together")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration samples")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/axes.json"))
    return parser.parse_args()


def runs(line: str, ways: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways to carry out a line of sizes, each with its options."""
    if "=" not in line:
        share, _, pattern = line.partition(":")
        yield "ssmc, goal", {"target_params": float(share), **({"pattern": pattern} if pattern else {})}
        return
    removed = {axis: float(share) for axis, share in parse_values(line).items()}
    for way in ways:
        options, gone = dict(WAYS[way]), dict(removed)
        if states := options.pop("states", None):
            if "column" in gone:
                continue
            gone["column"] = states
        yield way, {"pattern": "+".join(gone), "sparsity": gone, **options}


def main() -> None:
    args = arguments()
    if args.merge:
        first, *others = [json.loads(path.read_text(encoding="utf-8")) for path in args.merge]
        for other in others:
            first["rows"] += other["rows"]
        args.out.write_text(json.dumps(first, indent=1) + "\n", encoding="utf-8")
        show(first)
        return
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    text = tokenize(read_texts(args.text), load_tokenizer(checkpoint))[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    rows: list[dict[str, Any]] = []
    report = {
        "model": str(args.model),
        "dense_perplexity": dense.ppl,
        "calibration": {"nsamples": args.nsamples, "seqlen": args.seqlen, "seeds": args.seeds},
        "heldout_tokens": dense.tokens,
        "window": args.window,
        "rows": rows,
        "conditions": asdict(now),
    }
    for line in args.sizes or SIZES[args.model]:
        for way, options in runs(line, args.ways):
            begun, found = time.process_time(), []
            for seed in args.seeds:
                calibration = {"calib": str(args.calib), "nsamples": args.nsamples, "seqlen": args.seqlen, "seed": seed}
                with TemporaryDirectory() as folder:
                    result = compress(args.model, out=f"{folder}/masked", **calibration, **options)
                    done = export(result.directory, format="safetensors")
                    smaller = load_checkpoint(done.directory, dtype=torch.float32)
                found.append(excess_loss(perplexity(use_fast_scan(smaller.model), text, args.window), dense))
            seconds, nats = (time.process_time() - begun) / len(found), [excess.nats for excess in found]
            gone = result.config.sparsity if isinstance(result.config.sparsity, dict) else {}
            gone = gone or {result.config.pattern: result.config.sparsity}
            before, after = done.parameters
            rows.append({"line": line, "removed": gone, "way": way, "parameters": after / before})
            rows[-1] |= {"excess_nats": fmean(nats), "stderr": fmean(e.stderr or 0.0 for e in found), "runs": nats}
            rows[-1] |= {"spread": stdev(nats) if len(nats) > 1 else None, "cpu_seconds": seconds}
            Console().print(rows[-1])
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


def show(report: dict[str, Any]) -> None:
    """The rows as a table."""
    table = Table("removed", "way", "parameters", "excess (nats)", title=f"{report['model']}, nothing trained")
    for row in report["rows"]:
        gone = ", ".join(f"{axis} {share:.3g}" for axis, share in row["removed"].items())
        excess = f"{row['excess_nats']:.4f} ± {row['stderr']:.4f}"
        table.add_row(gone, row["way"], f"{row['parameters']:.3f}", excess)
    Console().print(table)


if __name__ == "__main__":
    main()
