"""What a trained mixture loses without some experts, or neurons of all experts: every score, with repair and without.

    python -m benchmarks.loss.experts MODEL  # MODEL: what benchmarks.models.make_tiny_moe wrote
    python -m benchmarks.loss.experts MODEL --axes expert --shares 0.5 --seeds 0

"Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over windows of held-out text, as
the mean over calibration samples drawn with several seeds, and with its spread over these. No weight is trained. What
is done is written after every row.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import CompressConfig
from ssmc.compressor.options.patterns import EXPERT, EXPERT_WIDTH, scores_of
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hybrid with experts")
    parser.add_argument("--axes", nargs="+", default=[EXPERT, EXPERT_WIDTH], choices=[EXPERT, EXPERT_WIDTH])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5], help="that go")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration samples")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experts.json"))
    return parser.parse_args()


def samples(tokens: torch.Tensor, args: argparse.Namespace, seed: int) -> torch.Tensor:
    """(nsamples, seqlen) from random places of the calibration text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - args.seqlen, (args.nsamples,), generator=generator)
    return torch.stack([tokens[start : start + args.seqlen] for start in starts])


def main() -> None:
    args = arguments()
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    model, tokenizer = use_fast_scan(checkpoint.model), load_tokenizer(checkpoint)
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    calibration = tokenize(read_texts(args.calib), tokenizer)
    dense = perplexity(model, text, args.window)
    report: dict[str, Any] = {
        "model": {"parameters": checkpoint.parameters, "config": checkpoint.config.to_diff_dict()},
        "dense_perplexity": dense.ppl,
        "settings": {"nsamples": args.nsamples, "seqlen": args.seqlen, "window": args.window, "seeds": args.seeds},
        "heldout_tokens": dense.tokens,
        "rows": [],
        "conditions": asdict(now),
    }
    if args.out.exists():  # what was measured of the other axis in the same way stays
        earlier = json.loads(args.out.read_text(encoding="utf-8"))
        if earlier["settings"] == report["settings"]:
            report["rows"] = [row for row in earlier["rows"] if row["axis"] not in args.axes]
    for axis, share, repair in product(args.axes, args.shares, (False, True)):
        for score in scores_of(axis):
            found = []
            for seed in args.seeds:
                smaller, tokens = copy.deepcopy(model), samples(calibration, args, seed)
                options = {"pattern": axis, "sparsity": share, "score": score, "repair": repair, "seed": seed}
                config = CompressConfig(model=args.model, **options)
                pruned(smaller, checkpoint.architecture, tokens, config, {})
                found.append(excess_loss(perplexity(use_fast_scan(smaller), text, args.window), dense))
            nats = [excess.nats for excess in found]
            spread = statistics.stdev(nats) / math.sqrt(len(nats)) if len(nats) > 1 else None
            row = {"axis": axis, "share": share, "score": score, "repair": repair, "excess_nats": statistics.mean(nats)}
            row |= {"stderr": statistics.mean(e.stderr or 0.0 for e in found), "stderr_seeds": spread, "runs": nats}
            report["rows"].append(row)
            print(
                f"{axis} {share:g}, {score}, {'repair' if repair else 'no repair'}: {row['excess_nats']:.4f}",
                flush=True,
            )
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


def show(report: dict[str, Any]) -> None:
    """A line for each score, the excess without and with repair."""
    rows = {(r["axis"], r["share"], r["repair"], r["score"]): r["excess_nats"] for r in report["rows"]}
    for axis in dict.fromkeys(row["axis"] for row in report["rows"]):
        shares = sorted({row["share"] for row in report["rows"]})
        columns = [column for share in shares for column in (f"{share:.0%}", "+ repair")]
        table = Table(
            "score", *columns, title=f"{axis}: excess in nats, dense perplexity {report['dense_perplexity']:.2f}"
        )
        for score in scores_of(axis):
            cells = [rows.get((axis, share, repair, score)) for share in shares for repair in (False, True)]
            table.add_row(score, *("" if cell is None else f"{cell:.4f}" for cell in cells))
        Console().print(table)


if __name__ == "__main__":
    main()
