"""What takes the steps of a distillation: loss after the same steps by several optimisers, as a table and JSON.

    python -m benchmarks.loss.optimisers

A quarter of the channels of `tiny` go, with repair; then each optimiser takes the same steps on the same text. Loss is
the mean negative log-likelihood above the dense model's, in nats a token, on held-out text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import print_conditions
from ssmc.compressor import compress
from ssmc.compressor.distillation.narrowed import Left, narrowed
from ssmc.compressor.distillation.steps import Pair, divergence
from ssmc.compressor.methods.descent import Pace, batches
from ssmc.runtime.measure.losses import last_hidden
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import draw_windows, read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

SEQUENCES, LENGTH = 4, 256  # of a step
CELLS = ("adam:5e-4:5e-4", "muon:5e-4:5e-4", "muon:5e-4:1.5e-4", "muon:7e-4:1e-3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=CELLS, help="OPTIMISER:RATE:RATE of what is no projection")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--calib", default=calibration_path(), help="text of the steps; by default the embedded stories"
    )
    parser.add_argument("--max-tokens", type=int, default=6144, help="of held-out text")
    parser.add_argument("--nsamples", type=int, default=64, help="that channels are pruned on")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/optimisers.json"))
    args = parser.parse_args()
    report = {"conditions": asdict(print_conditions()), "settings": {"steps": args.steps, "tokens": SEQUENCES * LENGTH}}
    dense = load_checkpoint("tiny", dtype=torch.float32)
    tokenizer = load_tokenizer(dense)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        layers = compress("tiny", out=out, pattern="channel", sparsity=0.25, nsamples=args.nsamples).layers
        student = load_checkpoint(out, dtype=torch.float32)
    left = [Left(layer.states_kept, layer.channels_kept) for layer in layers]
    pair = Pair(dense.architecture, use_fast_scan(student.model), use_fast_scan(dense.model))
    pair.teacher.requires_grad_(False)
    text = tokenize(read_texts(heldout_path()), tokenizer)[: args.max_tokens]
    seen = draw_windows(args.calib, tokenizer, args.steps * SEQUENCES, LENGTH, 0).tokens
    base = perplexity(pair.teacher, text, 512)
    report["before"] = excess_loss(perplexity(pair.student, text, 512), base).nats
    table = Table(
        "optimiser", "loss", "seconds of one thread", title=f"{args.steps} steps, {report['before']:.4f} before"
    )
    report["rows"] = []
    for cell in args.cells:
        one = Pair(pair.architecture, copy.deepcopy(pair.student), pair.teacher)
        start = time.process_time()
        with narrowed(one.architecture, one.student, left):
            take_steps(one, seen, args.steps, cell)
        seconds = time.process_time() - start
        loss = excess_loss(perplexity(one.student, text, 512), base).nats
        report["rows"].append({"cell": cell, "excess": loss, "seconds": seconds})
        table.add_row(cell, f"{loss:.4f}", f"{seconds:.0f}")
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(width=100).print(table)


def take_steps(pair: Pair, seen: torch.Tensor, steps: int, cell: str) -> None:
    """Steps on the narrow student, in place, by what `cell` names."""
    name, rate, other = cell.split(":")
    parameters = dict(pair.student.named_parameters())
    matrices = [p for key, p in parameters.items() if p.dim() == 2 and "embed" not in key and "A_log" not in key]
    rest = [p for p in parameters.values() if all(p is not matrix for matrix in matrices)]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimisers = [torch.optim.Adam(rest, lr=float(other), betas=(0.9, 0.95))]
    if name == "muon":
        muon = torch.optim.Muon(matrices, lr=float(rate), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimisers.append(muon)
    else:
        optimisers.append(torch.optim.Adam(matrices, lr=float(rate), betas=(0.9, 0.95)))
    pace, order = Pace(steps, ()), batches(len(seen), SEQUENCES, 0)
    peaks = [float(other), float(rate)]
    for step in range(1, steps + 1):
        inputs = seen[next(order)]
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = peak * pace.at(step)
        found = divergence(pair, inputs, last_hidden(pair.teacher, inputs), backward=True)
        if not math.isfinite(found):
            return
        for optimiser in optimisers:
            optimiser.step()


if __name__ == "__main__":
    main()
