"""Channels, layers and combinations: what each way to prune them loses on held-out text, as table and JSON.

    python -m benchmarks.loss.channels  # the embedded model and its texts
    python -m benchmarks.loss.channels MODEL --calib train.jsonl --text valid.jsonl

Scores x sparsities without and with repair for channels; states and layers beside them; and combinations. "Excess" is
the mean negative log-likelihood above the dense model's, in nats a token, over non-overlapping windows.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.pruning import pruned as in_place
from benchmarks.reporting import print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, LAYER, scores_of
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

ALONE, TOGETHER = "alone", "together"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5], help="of channels")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/channels.json"))
    return parser.parse_args()


def cases(sparsities: list[float]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Table, row, options of a run."""
    for score in scores_of(CHANNEL):
        for sparsity in sparsities:
            yield CHANNEL, score, {"pattern": CHANNEL, "score": score, "sparsity": sparsity}
    yield ALONE, "column 75 %", {"pattern": COLUMN, "sparsity": 0.75}
    for score in scores_of(LAYER)[:2]:
        for sparsity in (0.17, 0.34):
            yield (
                ALONE,
                f"layer {sparsity:.0%}, {score}",
                {"pattern": LAYER, "score": score, "sparsity": sparsity},
            )
    for sparsity in sparsities:
        both = {"pattern": f"{COLUMN}+{CHANNEL}", "sparsity": {COLUMN: 0.75, CHANNEL: sparsity}}
        yield TOGETHER, f"column 75 % + channel {sparsity:.0%}", both
    all_three = {LAYER: 0.17, COLUMN: 0.75, CHANNEL: sparsities[0]}
    name = f"layer 17 % + column 75 % + channel {sparsities[0]:.0%}"
    yield TOGETHER, name, {"pattern": f"{LAYER}+{COLUMN}+{CHANNEL}", "sparsity": all_three}


def pruned(checkpoint: Checkpoint, tokens: torch.Tensor, options: dict[str, Any]) -> tuple[torch.nn.Module, list]:
    config = configure(model="benchmark", **options)
    model = copy.deepcopy(checkpoint.model)
    done = in_place(model, checkpoint.architecture, tokens, config, checkpoint.dtypes)
    return model, [None if layer.out_proj is None else layer.out_proj.error for layer in done.layers]


def main() -> None:
    args = arguments()
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    calibration = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed)
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    rows = []
    runs = [(*case, repair) for case in cases(args.sparsities) for repair in (False, True)]
    for table, name, options, repair in track(runs, "channels"):
        model, errors = pruned(checkpoint, calibration.tokens, {**options, "repair": repair, "seed": args.seed})
        result = perplexity(model, text, args.window)
        excess = result.nll_per_token - dense.nll_per_token
        row = {"table": table, "name": name, "repair": repair, "perplexity": result.ppl, "excess_nats": excess}
        rows.append({**row, "options": options, "layer_errors": errors})
    report = {
        "model": Path(args.model).name,
        "dense_perplexity": dense.ppl,
        "calibration": {"nsamples": len(calibration.tokens), "seqlen": args.seqlen, "seed": args.seed},
        "heldout_tokens": dense.tokens,
        "conditions": asdict(now),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def print_table(report: dict) -> None:
    table = Table(title=f"{report['model']}: perplexity (excess nats); dense {report['dense_perplexity']:.3f}")
    for heading in ("pattern", "", "without repair", "with repair"):
        table.add_column(heading)
    cells: dict[tuple[str, str, str], dict[bool, dict]] = {}
    for row in report["rows"]:
        sparsity = f"{row['options']['sparsity']:.0%}" if row["table"] == CHANNEL else ""
        cells.setdefault((row["table"], row["name"], sparsity), {})[row["repair"]] = row
    for (kind, name, sparsity), pair in cells.items():
        texts = [f"{pair[repair]['perplexity']:.3f} ({pair[repair]['excess_nats']:.4f})" for repair in (False, True)]
        table.add_row(kind, f"{name} {sparsity}", *texts)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
