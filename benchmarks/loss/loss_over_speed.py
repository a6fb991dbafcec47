"""Loss over speed: what states, channels and layers cost for the time they save, each alone, and the search's mixture.

    python -m benchmarks.loss.loss_over_speed  # the embedded model and its texts
    python -m benchmarks.loss.loss_over_speed MODEL --calib train.jsonl --text valid.jsonl

Every model is compressed, exported and loaded by stock transformers with our scan, then all of them are timed in turns:
a prefill and a step of decoding, end to end, as a share of the dense model's time. Loss is the mean negative
log-likelihood above the dense model's, in nats a token, on held-out text that nothing was fitted to. "searched" are the
results of `ssmc compress --target-latency`, for each phase its own; "paper" is SparseSSM's column pruning (vote, no
repair), and beside it stands what the search finds for the same time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

from benchmarks.reporting import FIGURES, print_conditions
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.bench import Workload
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure.conditions import load_average
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

matplotlib.use("svg")

CPU = torch.device("cpu")
PHASES = ("prefill", "decode")
GRID = {"column": (0.5, 0.75, 0.875), "channel": (0.125, 0.25, 0.375, 0.5), "layer": (1, 2)}
PAPER = {"pattern": "column", "score": "sparsessm-vote", "repair": False}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.75, 0.6], help="shares of the time")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32 * 1024, help="of held-out text")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_over_speed"), help="writes OUT.json")
    parser.add_argument("--plot", type=Path, help="where the plot goes, by default docs/figures/NAME OF OUT.svg")
    parser.add_argument("--keep", type=Path, help="folder for the models, to go on where an earlier run was stopped")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    now = print_conditions()
    with TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        runs = compressed(args, folder)
        rows = measured(args, folder, runs)
    settings = {
        k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "plot", "keep")
    }
    report = {"conditions": asdict(now), "load_after": load_average(), "settings": settings, "rows": rows}
    report["envelope"] = {phase: envelope(rows, phase) for phase in PHASES}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, args.plot or FIGURES / f"{args.out.name}.svg")
    show(report)


def compressed(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Compress and export every model; name -> series and what the search said."""
    layers = load_checkpoint(args.model).dimensions.n_layer
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    for part, shares in GRID.items():
        for share in shares:
            sparsity = share / layers if part == "layer" else share
            if sparsity < 1:
                wanted[f"{part} {share:g}"] = (part, {"pattern": part, "sparsity": sparsity})
    for share in GRID["column"]:
        wanted[f"paper {share:g}"] = ("paper", {**PAPER, "sparsity": share})
    for phase in PHASES:
        for target in args.targets:
            goal = {"target_latency": target, "phase": phase, "length": args.length}
            wanted[f"searched {phase} {target:g}"] = (f"searched {phase}", goal)
    runs = {}
    for name, (series, options) in track(wanted.items(), "compressing"):
        runs[name] = {"series": series, "options": options, **one(args, folder / name.replace(" ", "-"), options)}
    return runs


def one(args: argparse.Namespace, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Compress and export one model, unless an earlier run has; why not, where it cannot be."""
    try:
        if not (out / "safetensors" / "ssmc.json").is_file():
            common = {"nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed, "calib": args.calib}
            compress(args.model, out=out, force=True, **common, **options)
            export(out, force=True)
    except SsmcError as error:
        return {"failed": str(error)}
    manifest = json.loads((out / "ssmc.json").read_text(encoding="utf-8"))
    target = manifest.get("goal")
    dimensions = json.loads((out / "safetensors" / "ssmc.json").read_text(encoding="utf-8"))["dimensions"]
    found = {"sizes": {key: dimensions[key] for key in ("n_layer", "d_inner", "d_state")}}
    if target:
        found |= {key: target[key] for key in ("asked", "expected", "outcome", "trials", "curves")}
    return found


def measured(args: argparse.Namespace, folder: Path, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and time of all models, the dense one first."""
    dense = load_checkpoint(args.model, dtype=torch.float32)
    text = tokenize(read_texts(args.text), load_tokenizer(dense))[: args.max_tokens]
    models = {"dense": use_fast_scan(dense.model)}
    for name, run in runs.items():
        if "failed" not in run:
            path = folder / name.replace(" ", "-") / "safetensors"
            models[name] = use_fast_scan(load_checkpoint(path, dtype=torch.float32).model)
    scores = {name: perplexity(model, text, args.window) for name, model in track(models.items(), "perplexity")}
    rows = [{"name": name, **run} for name, run in runs.items() if "failed" in run]
    ratios = {phase: times(models, Workload(phase, 1, args.length), args.repeats) for phase in PHASES}
    for name in models:
        loss = excess_loss(scores[name], scores["dense"])
        row = {"name": name, **runs.get(name, {"series": "dense", "sizes": dense.dimensions.as_dict()})}
        row |= {"perplexity": scores[name].ppl, "excess_nats": loss.nats, "excess_stderr": loss.stderr}
        row["time"] = {phase: asdict(ratios[phase][name]) for phase in PHASES}
        rows.append(row)
    return rows


def times(models: dict[str, torch.nn.Module], workload: Workload, repeats: int) -> dict[str, Any]:
    """Time over the dense model's, all models in turns."""
    runs = {name: workload.on(model) for name, model in models.items()}
    prepare = runs if workload.phase == "decode" else None
    timings = interleave(runs, CPU, repeats, budget=100, calls=workload.calls, prepare=prepare)
    return {name: paired_ratio(timing, timings["dense"]) for name, timing in timings.items()}


def envelope(rows: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    """Whether no model pruned in one way beats those that the search found for this phase: who is as fast as one of
    them, 2 % apart at most, or faster, and loses less."""
    done = [row for row in rows if "time" in row and row["series"] != "dense"]
    beaten = {}
    for row in done:
        if row["series"] == f"searched {phase}":
            time, nats = row["time"][phase]["median"], row["excess_nats"]
            beaten[row["name"]] = [
                other["name"]
                for other in done
                if not other["series"].startswith("searched")
                and other["time"][phase]["median"] <= 1.02 * time
                and other["excess_nats"] < nats - 2 * ((row["excess_stderr"] or 0) + (other["excess_stderr"] or 0))
            ]
    return {"lower_envelope": not any(beaten.values()), "beaten_by": beaten}


def show(report: dict[str, Any]) -> None:
    table = Table(title="Loss over speed, held-out text", title_justify="left")
    for column in ("model", "layers", "channels", "states", "prefill", "decode", "perplexity", "excess nats"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in report["rows"]:
        if "failed" in row:
            table.add_row(row["name"], row["failed"])
            continue
        sizes = [str(row["sizes"][key]) for key in ("n_layer", "d_inner", "d_state")]
        spread = [row["time"][phase] for phase in PHASES]
        shown = [f"{t['median']:.3f} ({t['low']:.3f} to {t['high']:.3f})" for t in spread]
        table.add_row(row["name"], *sizes, *shown, f"{row['perplexity']:.3f}", f"{row['excess_nats']:.4f}")
    Console(width=150).print(table)
    for phase in PHASES:
        print(f"{phase}: searched is the lower envelope: {report['envelope'][phase]}")


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ssmc"
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    styles = {"column": "C0", "channel": "C1", "layer": "C2", "paper": "C7"}
    names = {"paper": "SparseSSM's column pruning (vote, no repair)"}
    for axes, phase in zip(panels, PHASES, strict=True):
        for series, color in {**styles, f"searched {phase}": "k"}.items():
            rows = [row for row in report["rows"] if row["series"] == series and "time" in row]
            rows.sort(key=lambda row: row["time"][phase]["median"])
            x = [row["time"][phase]["median"] for row in rows]
            spread = [
                [abs(row["time"][phase][side] - v) for row, v in zip(rows, x, strict=True)] for side in ("low", "high")
            ]
            y = [max(row["excess_nats"], 1e-4) for row in rows]
            searched = series.startswith("searched")
            label = "searched: all together" if searched else names.get(series, f"{series} alone")
            width = 2.2 if searched else 1.2
            axes.errorbar(x, y, xerr=spread, color=color, marker="o", ms=4, lw=width, elinewidth=0.8, label=label)
        axes.set(yscale="log", xlabel=f"time over the dense model's, {phase}", title=phase)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss above dense (nats a token)")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
