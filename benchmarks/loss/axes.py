"""A hybrid made smaller along all of its axes, beside Minitron's score without repair at the same sizes.

    python -m benchmarks.loss.axes                       # tiny-hybrid, on the embedded texts
    python -m benchmarks.loss.axes MODEL --calib train.jsonl --text valid.jsonl --sizes head=0.5,mlp=0.5

For each line of sizes the model is pruned as by default (chosen by the loss after repair, then fitted to the dense
model's residual stream), with half of its states gone besides, and by `--score minitron --no-repair`. No weight is
trained. "Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over windows of
held-out text; parameters are counted for the export. Minitron's score knows no states: where some go, they are those
of the score `exact`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
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
from ssmc.compressor.options.patterns import parse_values
from ssmc.compressor.search.hybrid_sizes import AXES, HybridSizes, Removed
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

SIZES = (
    "head=0.333333,mlp=0.72,attention=0.666667",
    "column=0.5,head=0.166667,mlp=0.74,attention=0.833333",
)
"""A quarter of the parameters of tiny-hybrid, of which embedding and head, 41 %, stay; without and with states."""

WAYS: dict[str, dict[str, Any]] = {
    "ssmc": {},
    "ssmc, half of the states on top": {"states": 0.5},
    "minitron, no repair": {"score": "minitron", "repair": False},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-hybrid")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="axis=share that goes, with commas between")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="those to measure")
    parser.add_argument("--merge", nargs="+", type=Path, help="do not run: put these JSON files of parts together")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/axes.json"))
    return parser.parse_args()


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
    tokenizer = load_tokenizer(checkpoint)
    tokens = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, 0).tokens
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    sizes, rows = HybridSizes(checkpoint, AXES), []
    for line in args.sizes:
        removed = {axis: float(share) for axis, share in parse_values(line).items()}
        for way in args.ways:
            how = WAYS[way]
            options, gone = dict(how), dict(removed)
            if states := options.pop("states", None):
                if "column" in gone:
                    continue
                gone["column"] = states
            config = configure(model=args.model, pattern="+".join(gone), sparsity=gone, **options)
            begun, model = time.process_time(), copy.deepcopy(checkpoint.model)
            pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes)
            seconds, excess = time.process_time() - begun, excess_loss(perplexity(model, text, args.window), dense)
            left = sizes.share_of_parameters(Removed(tuple((axis, gone[axis]) for axis in AXES if axis in gone)))
            rows.append({"removed": gone, "way": way, "parameters": left, "excess_nats": excess.nats})
            rows[-1] |= {"stderr": excess.stderr, "cpu_seconds": seconds}
            Console().print(rows[-1])
    report = {
        "model": str(args.model),
        "dense_perplexity": dense.ppl,
        "calibration": {"nsamples": len(tokens), "seqlen": args.seqlen, "seed": 0},
        "heldout_tokens": dense.tokens,
        "window": args.window,
        "rows": rows,
        "conditions": asdict(now),
    }
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
