"""All scores with and without repair at several sparsities: what each loses on held-out text, as table, plot and JSON.

    python -m benchmarks.loss.scores  # the embedded model and its texts
    python -m benchmarks.loss.scores tiny-mamba2 --out benchmarks/results/scores_mamba2   # the embedded Mamba-2
    python -m benchmarks.loss.scores MODEL --calib train.jsonl --text valid.jsonl

"Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over non-overlapping windows.
Where it is small it also says whether the changes happen to suit this text: a model is no optimum, so a change of first
order may gain or lose. --divergence measures the Kullback-Leibler divergence from the dense model's predictions as
well, which only grows with what is lost.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import FIGURES, print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.compressor.methods.states.counts import states_to_keep
from ssmc.compressor.options.patterns import COLUMN, scores_of
from ssmc.runtime.measure.losses import divergence, last_hidden
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

matplotlib.use("svg")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--scores", nargs="+", help="those to compare; by default all that judge this family's states")
    parser.add_argument("--repaired", nargs="*", help="those to show with repair too; by default all")
    parser.add_argument("--merge", nargs="+", type=Path, help="do not run: put these JSON files of parts together")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32 * 1024, help="of held-out text")
    parser.add_argument(
        "--divergence", type=int, default=0, help="windows to measure the divergence on, from the start"
    )
    parser.add_argument("--refine", type=int, default=0, help="gradient steps on each layer, where there is a repair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scores"), help="writes OUT.json")
    parser.add_argument("--plot", type=Path, help="where the plot goes, by default docs/figures/NAME OF OUT.svg")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.merge:
        show(merged([json.loads(path.read_text()) for path in args.merge]), args.out, args.plot)
        return
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    calibration = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed)
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    dense = perplexity(use_fast_scan(checkpoint.model), text, args.window)
    if args.divergence:
        windows = text.view(-1, args.window)[: args.divergence, :-1]
        hidden = last_hidden(checkpoint.model, windows)
    able = [score for score in scores_of(COLUMN) if score in (args.scores or scores_of(COLUMN))]
    if checkpoint.dimensions.heads is not None:
        able = [score for score in able if score != "magnitude"]  # all states of a head have one A_log
    repaired = able if args.repaired is None else args.repaired
    cells = [(s, r, p) for s in able for r in (False, True) for p in args.sparsities if not r or s in repaired]
    rows = []
    for score, repair, sparsity in track(cells, "scores"):
        refine = args.refine if repair else 0
        config = configure(
            model=args.model, score=score, repair=repair, sparsity=sparsity, seed=args.seed, refine=refine
        )
        begun = time.process_time()
        model = copy.deepcopy(checkpoint.model)
        tokens = calibration.tokens
        layers = pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes).layers
        seconds = time.process_time() - begun
        result = perplexity(model, text, args.window)
        excess = excess_loss(result, dense)
        rows.append(
            {
                "score": score,
                "repair": repair,
                "sparsity": sparsity,
                "kept": states_to_keep(checkpoint.dimensions.d_state, sparsity),
                "perplexity": result.ppl,
                "excess_nats": excess.nats,
                "stderr": excess.stderr,  # over paired windows
                "divergence": divergence(hidden, model, windows) if args.divergence else None,
                "cpu_seconds": seconds,
                "layer_errors": [None if layer.states is None else layer.states.error for layer in layers],
            }
        )
    report = {
        "model": str(args.model),
        "dense_perplexity": dense.ppl,
        "calibration": {"nsamples": len(calibration.tokens), "seqlen": args.seqlen, "seed": args.seed},
        "refine": args.refine,
        "heldout_tokens": dense.tokens,
        "divergence_tokens": args.divergence * (args.window - 1),
        "conditions": asdict(now),
        "rows": rows,
    }
    show(report, args.out, args.plot)


def merged(parts: list[dict]) -> dict:
    """One report of runs that differ in their scores and sparsities only."""
    different = dict.fromkeys(("conditions", "rows"))
    if any(part | different != parts[0] | different for part in parts):
        raise SystemExit("these are parts of different runs")
    rows = [row for part in parts for row in part["rows"]]
    return parts[0] | {"conditions": [part["conditions"] for part in parts], "rows": rows}


def show(report: dict, out: Path, picture: Path | None) -> None:
    """Write a report and its plot, and print it as a table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    scores = list(dict.fromkeys(row["score"] for row in report["rows"]))
    plot(report, picture or FIGURES / f"{out.name}.svg", scores)
    print_table(report, sorted({row["sparsity"] for row in report["rows"]}), scores)


def print_table(report: dict, sparsities: list[float], able: list[str]) -> None:
    table = Table(
        title=f"{report['model']}: perplexity (excess nats) divergence; dense {report['dense_perplexity']:.3f}"
    )
    table.add_column("score")
    for sparsity in sparsities:
        table.add_column(f"{sparsity:.0%}", justify="right")
        table.add_column(f"{sparsity:.0%} + repair", justify="right")
    by_cell = {(r["score"], r["sparsity"], r["repair"]): r for r in report["rows"]}
    for score in able:
        cells = [by_cell.get((score, s, repair)) for s in sparsities for repair in (False, True)]
        table.add_row(score, *(_cell(c) for c in cells))
    Console(width=200).print(table)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    text = f"{row['perplexity']:.3f} ({row['excess_nats']:.4f})"
    return text if row["divergence"] is None else f"{text} {row['divergence']:.4f}"


def plot(report: dict, path: Path, able: list[str]) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ssmc"
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for i, score in enumerate(able):
        for repair, style in ((False, "--"), (True, "-")):
            rows = [r for r in report["rows"] if r["score"] == score and r["repair"] is repair]
            rows.sort(key=lambda r: r["sparsity"])
            label = None if repair else score
            excess = [max(r["excess_nats"], 1e-5) for r in rows]
            axes.plot([r["sparsity"] for r in rows], excess, style, color=f"C{i}", marker=".", label=label)
    axes.set(yscale="log", xlabel="states removed", ylabel="excess loss (nats a token)")
    axes.set_title("Column pruning: without repair (dashed), with repair (solid)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
