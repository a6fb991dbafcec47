"""What distillation buys: loss above the dense model before and after, on held-out text, as table and JSON.

    python -m benchmarks.loss.distill                                # the embedded texts
    python -m benchmarks.loss.distill --calib train.jsonl --device cuda
    python -m benchmarks.loss.distill --cells tiny:column:0.875 --refine 150 --steps 100  # states, refined first
    python -m benchmarks.loss.distill --cells m22:layer+column+channel:layer=0.17,column=0.9375,channel=0.25

"Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over windows of held-out text
that neither calibration nor steps have seen. Seconds are those of the steps alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import print_conditions
from ssmc.compressor import compress
from ssmc.compressor.distillation.narrowed import Left
from ssmc.compressor.distillation.run import Lesson, distil_checkpoint
from ssmc.runtime import half_precision
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

CELLS = ("tiny:channel:0.25", "tiny:channel:0.5", "tiny-mamba2:channel:0.5", "tiny:column:0.875")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=CELLS, help="MODEL:PATTERN:SPARSITY")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nsamples", type=int, default=64, help="of calibration before the steps")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of each")
    parser.add_argument("--refine", type=int, default=0, help="gradient steps on each layer before")
    parser.add_argument("--calib", help="calibration text; by default the embedded stories")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--max-tokens", type=int, default=32 * 1024, help="of held-out text")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="linear maps in float32 where bfloat16 is fast, too")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/distill.json"))
    args = parser.parse_args()
    names = ("steps", "window", "refine", "nsamples", "seqlen", "max_tokens")
    settings = {name: getattr(args, name) for name in names}
    if args.float32:
        setattr(half_precision, "is_fast", lambda device: False)  # noqa: B010 - what no option of ssmc does
    settings["bfloat16"] = half_precision.is_fast(torch.device(args.device))
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "settings": settings}
    report |= {"device": args.device, "rows": []}
    for cell in args.cells:
        report["rows"].append(row := measured(cell, args))
        print(row, flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("removed", "repair alone", f"{args.steps} steps", "divergence before", "after", "seconds")
    for done in report["rows"]:
        figures = (done["excess_before"], done["excess"], done["divergence_before"], done["divergence"])
        table.add_row(done["cell"], *(f"{figure:.4f}" for figure in figures), f"{done['seconds']:.0f}")
    Console(width=120).print(table)


def measured(cell: str, args: argparse.Namespace) -> dict[str, object]:
    """One model before and after distillation."""
    source, pattern, sparsity = cell.split(":")
    dense = load_checkpoint(source, dtype=torch.float32)
    text = tokenize(read_texts(args.text), load_tokenizer(dense))[: args.max_tokens]
    wanted = perplexity(use_fast_scan(dense.model), text, args.window)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        parts = sparsity if "=" in sparsity else float(sparsity)
        samples = {"nsamples": args.nsamples, "seqlen": args.seqlen}
        options = {"pattern": pattern, "sparsity": parts, **samples, "calib": args.calib, "device": args.device}
        busy = time.process_time()
        pruned = compress(source, out=out, refine=args.refine, **options).layers
        layers = [Left(layer.states_kept, layer.channels_kept) for layer in pruned]
        pruning = time.process_time() - busy
        student = load_checkpoint(out, dtype=torch.float32)
        before = excess_loss(perplexity(use_fast_scan(student.model), text, args.window), wanted)
        start, busy = time.perf_counter(), time.process_time()
        done = distil_checkpoint(student, source, Lesson(args.steps, args.calib, device=args.device), layers=layers)
        seconds, stepping = time.perf_counter() - start, time.process_time() - busy
        after = excess_loss(perplexity(student.model, text, args.window), wanted)
    row = {"cell": cell, "excess_before": before.nats, "excess": after.nats, "stderr": after.stderr, "seconds": seconds}
    row |= {"cpu_seconds": {"pruning": pruning, "steps": stepping}}
    return row | {"divergence_before": done.divergence_before, "divergence": done.divergence, "steps": done.best_step}


if __name__ == "__main__":
    main()
