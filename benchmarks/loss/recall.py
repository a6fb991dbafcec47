"""What is lost where a text repeats something from far back, by what calibration tokens count and what they are.

    python -m benchmarks.loss.recall                      # tiny
    python -m benchmarks.loss.recall tiny-mamba2 --cases "weight 0" "weight 10"
    python -m benchmarks.loss.recall MODEL --calib train.jsonl --text valid.jsonl --windows 96

The score exact with repair, states of all layers. "Excess" is the loss above the dense model's, in nats a token;
"divergence" the Kullback-Leibler divergence from its predictions, which says the same with far less noise: of a few
hundred tokens the loss depends on which words come. Both of all tokens and of those seen more than 100 tokens back,
with standard errors over windows. `--recall-weight` of `ssmc compress` is what counts; the other cases are what was
tried beside it (docs/recall.md).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.losses import last_hidden
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind, of_kind
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

WORST = 0.05  # part of the calibration tokens that counts more in the case "worst positions"
PASSAGE = 32  # tokens of a passage that is repeated in a calibration sample


def repeated_passages(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every other sample (n, L) with four passages of its first half again in its second, more than 100 tokens on."""
    mixed, half = tokens.clone(), tokens.shape[1] // 2
    for row in range(0, len(tokens), 2):
        for number in range(4):
            source = int(torch.randint(half - 100, (1,), generator=generator))
            place = half + 2 * PASSAGE * number
            mixed[row, place : place + PASSAGE] = tokens[row, source : source + PASSAGE]
    return mixed


def listed_pairs(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every fourth sample (n, L) replaced by 32 pairs of tokens, listed again and again in other orders."""
    mixed, known = tokens.clone(), tokens.unique()
    for row in range(0, len(tokens), 4):
        pairs = known[torch.randint(len(known), (32, 2), generator=generator)]
        lists = [pairs[torch.randperm(32, generator=generator)].flatten() for _ in range(-(-tokens.shape[1] // 64))]
        mixed[row] = torch.cat(lists)[: tokens.shape[1]]
    return mixed


@torch.no_grad()
def uncertain(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Weights (n, L): (1 - sum of p^2)^2 of the dense model's prediction, the more the less certain it is; mean 1."""
    chances = [checkpoint.model(row[None], use_cache=False).logits[0].softmax(-1) for row in tokens]
    weights = (1 - torch.stack([p.square().sum(-1) for p in chances])).square()
    return weights / weights.mean()


@torch.no_grad()
def where_worst(checkpoint: Checkpoint, tokens: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Weights (n, L) of 11 where a pruned model's predictions are furthest from the dense one's, else 1."""
    use_fast_scan(model)
    rows = []
    for row in tokens:
        ours, theirs = (m(row[None], use_cache=False).logits[0].log_softmax(-1) for m in (model, checkpoint.model))
        rows.append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1))
    moved = torch.stack(rows)
    return 1 + 10.0 * (moved > moved.flatten().quantile(1 - WORST))


Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
CASES: dict[str, tuple[float, Change | None, bool, bool]] = {
    # weight on recall, what becomes of the samples, swaps after the elimination, weights by certainty in its place
    "weight 0, no swaps": (0.0, None, False, False),
    "weight 0": (0.0, None, True, False),
    "weight 10": (10.0, None, True, False),
    "weight 40": (40.0, None, True, False),
    "uncertain predictions": (0.0, None, True, True),
    "worst positions": (0.0, None, True, False),
    "repeated passages, weight 0": (0.0, repeated_passages, True, False),
    "repeated passages, weight 10": (10.0, repeated_passages, True, False),
    "listed pairs, weight 0": (0.0, listed_pairs, True, False),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75, 0.875])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32, help="of held-out text")
    parser.add_argument("--refine", type=int, default=0, help="gradient steps on each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/recall_MODEL.json")
    return parser.parse_args()


class Judge:
    """The dense model's predictions on a text, and how far others are from them."""

    def __init__(self, checkpoint: Checkpoint, windows: torch.Tensor):
        self.windows, self.kinds = windows, kinds_of(windows)
        self.hidden = last_hidden(use_fast_scan(checkpoint.model), windows)[:, :-1]
        self.dense = self._measure(checkpoint.model)[0]

    @torch.no_grad()
    def _measure(self, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and divergences, (W, L - 1) each."""
        head, losses, divergences = model.get_output_embeddings(), [], []
        for row, wanted in zip(self.windows, self.hidden, strict=True):
            ours = head(last_hidden(model, row[None])[0, :-1]).log_softmax(-1)
            losses.append(-ours.gather(1, row[1:, None])[:, 0].double())
            theirs = head(wanted).log_softmax(-1)
            divergences.append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).double())
        return torch.stack(losses), torch.stack(divergences)

    def judge(self, model: torch.nn.Module) -> dict[str, Any]:
        """Excess loss and divergence, of all tokens and of each kind."""
        losses, divergences = (found.numpy() for found in self._measure(use_fast_scan(model)))
        excess, moved = loss_by_kind(losses, self.kinds, self.dense.numpy()), loss_by_kind(divergences, self.kinds)
        worst = torch.as_tensor(divergences).flatten()
        worst = worst[worst > worst.quantile(0.99)]
        report: dict[str, Any] = {"worst": {"tokens": len(worst), "divergence": float(worst.mean())}}
        for kind in ("all", "repeated", "far", "rare", "new"):
            lost, far = of_kind(excess, kind), of_kind(moved, kind)
            if lost is not None and far is not None:
                report[kind] = {"tokens": lost.tokens, "excess": lost.excess, "excess_stderr": lost.excess_stderr}
                report[kind] |= {"divergence": far.nll, "divergence_stderr": far.stderr}
        return report


def run(
    case: str, sparsity: float, checkpoint: Checkpoint, tokens: torch.Tensor, args: argparse.Namespace
) -> torch.nn.Module:
    """The model, pruned."""
    weight, change, swaps, certainty = CASES[case]
    tokens = tokens if change is None else change(tokens, torch.Generator().manual_seed(args.seed))
    options = {"sparsity": sparsity, "recall_weight": weight, "refine": args.refine}
    model, config = copy.deepcopy(checkpoint.model), configure(model="m", **options)
    with ExitStack() as stack:
        if not swaps:
            stack.enter_context(patch("ssmc.compressor.methods.states.elimination.exchange", lambda _, kept: kept))
        if case == "worst positions":
            first = run("weight 0", sparsity, checkpoint, tokens, args)
            weights = where_worst(checkpoint, tokens, first)
            stack.enter_context(patch("ssmc.compressor.methods.states.weights.token_weights", lambda *_: weights))
        if certainty:
            weights = uncertain(checkpoint, tokens)
            stack.enter_context(patch("ssmc.compressor.methods.states.weights.token_weights", lambda *_: weights))
        pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes)
    return model


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer, name = load_tokenizer(checkpoint), Path(args.model).name
    tokens = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed).tokens
    text = tokenize(read_texts(args.text), tokenizer)[: args.windows * args.window]
    judge = Judge(checkpoint, text[: len(text) // args.window * args.window].view(-1, args.window))
    rows: list[dict[str, Any]] = []
    names = ("nsamples", "seqlen", "window", "seed", "refine")
    report = {"model": name, "settings": {n: getattr(args, n) for n in names}, "conditions": asdict(now), "rows": rows}
    for sparsity in args.sparsities:
        for case in args.cases:
            kinds = judge.judge(run(case, sparsity, checkpoint, tokens, args))
            rows.append({"sparsity": sparsity, "case": case, "kinds": kinds})
            print(f"{sparsity:.1%} {case}: {_cell(kinds, 'excess')}; {_cell(kinds, 'divergence')}", flush=True)
            out = args.json or Path(f"benchmarks/results/recall_{name.replace('-', '_')}.json")
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    headings = ("excess, all and far", "ratio", "divergence, all and far", "ratio", "of the worst 1 %")
    table = Table("removed", "case", *headings, title=name)
    for row in rows:
        cells = [f for figure in ("excess", "divergence") for f in (_cell(row["kinds"], figure), _ratio(row, figure))]
        worst = f"{row['kinds']['worst']['divergence']:.3f}"
        table.add_row(f"{row['sparsity']:.1%}", row["case"], *cells, worst)
    Console(width=150).print(table)


def _cell(kinds: dict[str, Any], figure: str) -> str:
    return ", ".join(f"{kinds[kind][figure]:.4f} ± {kinds[kind][figure + '_stderr']:.4f}" for kind in ("all", "far"))


def _ratio(row: dict[str, Any], figure: str) -> str:
    return f"{row['kinds']['far'][figure] / row['kinds']['all'][figure]:.2f}"


if __name__ == "__main__":
    main()
