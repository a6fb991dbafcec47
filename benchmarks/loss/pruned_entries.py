"""Half of the entries of A_log pruned, in both forms: stored as 0 (A = -1), or such that the state has no memory.

    python -m benchmarks.loss.pruned_entries          # the embedded model and its texts

The paper's small losses for unstructured patterns come from an evaluation in which a pruned entry has no memory; stored
as 0, as its method says, the same masks give another model. "Excess" is the mean negative log-likelihood above the
dense model's, in nats a token, over windows of held-out text.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

SCORES = ("sparsessm", "sparsessm-vote", "ghost", "magnitude")
FORMS = ("zero", "forget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path())
    parser.add_argument("--text", default=heldout_path())
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pruned_entries.json"))
    args = parser.parse_args()
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    tokens = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, 0).tokens
    text = tokenize(read_texts(args.text), tokenizer)
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    rows = []
    for score in SCORES:
        for form in FORMS:
            model = copy.deepcopy(checkpoint.model)
            options = {"pattern": "unstructured", "sparsity": args.sparsity, "score": score, "pruned_entry": form}
            config = configure(model=args.model, nsamples=args.nsamples, seqlen=args.seqlen, **options)
            pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes)
            lost = excess_loss(perplexity(model, text, args.window), dense)
            rows.append({"score": score, "form": form, "excess_nats": lost.nats, "stderr": lost.stderr})
            print(rows[-1], flush=True)
    settings = {name: getattr(args, name) for name in ("sparsity", "nsamples", "seqlen", "window")}
    report = {"model": str(args.model), "settings": settings, "conditions": asdict(now), "rows": rows}
    report |= {"dense_perplexity": dense.ppl, "heldout_tokens": dense.tokens}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("score", *FORMS, title=f"{args.model}: excess nats, {args.sparsity:.0%} of the entries of A_log")
    for score in SCORES:
        cells = [row for row in rows if row["score"] == score]
        table.add_row(score, *(f"{row['excess_nats']:.4f} ± {row['stderr']:.4f}" for row in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
