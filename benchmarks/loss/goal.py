"""A goal of time and distillation in one command: what it loses on held-out text, and how long each part takes.

    python -m benchmarks.loss.goal MODEL --calib train.jsonl --text valid.jsonl
    python -m benchmarks.loss.goal tiny --target-latency 0.75 --distill 100

Does what `ssmc compress MODEL --target-latency 0.6 --phase decode --distill auto --calib train.jsonl` does. "Excess" is
the mean negative log-likelihood above the dense model's, in nats a token, over windows of a text that nothing was
fitted to. Seconds are of the clock and of the processors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import print_conditions
from ssmc.compressor import compress
from ssmc.runtime.half_precision import is_fast
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

PARTS = {"layer ": "pruning", "measuring": "pruning", "distilling": "steps"}  # by how progress begins; else: search


class Stages:
    """Takes the place of a progress bar and adds up what each part of a run takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by part: clock, processors
        self._part, self._since = "search", (time.perf_counter(), time.process_time())

    def __call__(self, label: str, done: int, total: int) -> None:
        """Time goes to the part that was told of last."""
        now = (time.perf_counter(), time.process_time())
        for i, (before, after) in enumerate(zip(self._since, now, strict=True)):
            self.seconds[self._part][i] += after - before
        self._since = now
        self._part = next((part for start, part in PARTS.items() if label.startswith(start)), "search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", help="calibration text; by default the embedded stories")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--target-latency", type=float, default=0.6)
    parser.add_argument("--phase", default="decode")
    parser.add_argument("--distill", default="auto", help="steps, or auto")
    parser.add_argument("--max-tokens", type=int, default=32 * 1024, help="of held-out text")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="where the model goes; by default it is thrown away")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/goal.json"))
    args = parser.parse_args()
    names = ("target_latency", "phase", "distill")
    settings = {name: getattr(args, name) for name in names}
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "settings": settings}
    report["bfloat16"] = is_fast(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        out, stages = args.out or Path(folder) / "out", Stages()
        result = compress(args.model, out=out, calib=args.calib, progress=stages, **settings)
        stages("written", 1, 1)
        report |= {"seconds": stages.seconds, "distilled": result.manifest["distilled"]}
        report["goal"] = {name: part for name, part in result.manifest["goal"].items() if name != "latency_table"}
        report["held_out"] = held_out(args, out)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("part", "seconds", "of processors")
    for part, (clock, busy) in stages.seconds.items():
        table.add_row(part, f"{clock:.0f}", f"{busy:.0f}")
    Console(width=120).print(report["goal"]["sizes"], report["held_out"], table)


def held_out(args: argparse.Namespace, out: Path) -> dict[str, float]:
    """The dense model's loss and what the compressed one loses above it, on text that nothing was fitted to."""
    dense, left = (load_checkpoint(source, dtype=torch.float32) for source in (args.model, out))
    text = tokenize(read_texts(args.text), load_tokenizer(dense))[: args.max_tokens]
    wanted = perplexity(use_fast_scan(dense.model), text, args.window)
    excess = excess_loss(perplexity(use_fast_scan(left.model), text, args.window), wanted)
    return {"dense_nats": wanted.nll_per_token, "excess_nats": excess.nats, "excess_stderr": excess.stderr}


if __name__ == "__main__":
    main()
