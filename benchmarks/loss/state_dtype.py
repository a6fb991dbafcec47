"""What SSM states in fewer bits cost: loss over the length of the text, alone and with states removed, and recall.

    python -m benchmarks.loss.state_dtype              # tiny-mamba2
    python -m benchmarks.loss.state_dtype tiny

States are rounded after every token, as if each had been written. "Excess" is the mean negative log-likelihood above
that of the dense model with float32 states, in nats a token, over windows that start from a fresh state.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pruning import pruned
from benchmarks.reporting import FIGURES, print_conditions
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.perplexity import excess_loss, losses_of_tokens, summarise
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.memory import format_bytes
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.scan.rounding import StateFormat
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

matplotlib.use("svg")

FORMS = {
    "int8": StateFormat(),
    "int8, to the nearest code": StateFormat(dithered=False),
    "int8, a scale for each channel": StateFormat(per="channel"),
    "int8, a scale for each head": StateFormat(per="head"),
    "float16": StateFormat("float16"),
}
PARTS = ("lengths", "pruned")
RECALL = ("all", "repeated", "far", "rare", "new")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-mamba2")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text, for the pruned models")
    parser.add_argument("--tokenizer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--max-tokens", type=int, default=16384, help="of held-out text")
    parser.add_argument(
        "--kept", type=int, nargs="+", help="numbers of states that stay; by default a quarter, and less"
    )
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024, help="of the pruned models")
    parser.add_argument("--refine", type=int, default=0, help="gradient steps on each layer of the pruned models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest is kept")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/state_dtype_MODEL")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    out = args.out or Path(f"benchmarks/results/state_dtype_{Path(args.model).name.replace('-', '_')}")
    now = print_conditions()
    checkpoint = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    text = tokenize(read_texts(args.text), tokenizer)[: args.max_tokens]
    sizes = checkpoint.dimensions
    report: dict[str, Any] = {
        "model": str(args.model),
        "tokens": len(text),
        "conditions": asdict(now),
        "channels_of_a_scale": sizes.scale_channels,
        "settings": {name: getattr(args, name) for name in ("nsamples", "seqlen", "window", "refine")},
    }
    if "lengths" in args.parts:
        report["lengths"] = over_length(checkpoint.model, text, args.lengths)
    if "pruned" in args.parts:
        calibration = draw_samples(args.calib, tokenizer, args.nsamples, args.seqlen, 0).tokens
        quarter = sizes.d_state // 4
        report["pruned"] = with_fewer_states(checkpoint, calibration, text, args, args.kept or [quarter, quarter - 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    report = {part: earlier[part] for part in PARTS if part in earlier} | report
    path.write_text(json.dumps(report, indent=1) + "\n")
    if all(part in report for part in PARTS):
        plot(report, FIGURES / f"{out.name}.svg")
        show(report)


def over_length(model: Any, text: torch.Tensor, lengths: list[int]) -> list[dict[str, Any]]:
    """The excess of every format at every length of the windows, and that of the second half of each window."""
    rows = []
    for length in lengths:
        _, exact = losses_of_tokens(use_fast_scan(model), text, length)
        for name, form in FORMS.items():
            windows, losses = losses_of_tokens(use_fast_scan(model, state_dtype=form, each_token=True), text, length)
            excess = excess_loss(summarise(windows, losses), summarise(windows, exact))
            late = float((losses - exact)[:, losses.shape[1] // 2 :].mean())
            row = {"length": length, "windows": len(windows), "form": name, "excess_nats": excess.nats}
            rows.append(row | {"stderr": excess.stderr, "excess_second_half": late})
            print(f"{length} tokens, {name}: {excess.nats:+.5f} (second half of the windows {late:+.5f})", flush=True)
    use_fast_scan(model)
    return rows


def with_fewer_states(
    checkpoint: Any, calibration: torch.Tensor, text: torch.Tensor, args: argparse.Namespace, kept: list[int]
) -> list[dict[str, Any]]:
    """Loss, recall and bytes of models with states removed, in float32 and in int8."""
    windows, dense = losses_of_tokens(use_fast_scan(checkpoint.model), text, args.window)
    kinds, sizes = kinds_of(windows), checkpoint.dimensions
    whole, rows = 4 * sizes.ssm_numbers, []
    for count in [sizes.d_state, *kept]:
        model = copy.deepcopy(checkpoint.model)
        if count < sizes.d_state:
            config = configure(model=args.model, sparsity=1 - count / sizes.d_state, refine=args.refine)
            pruned(model, checkpoint.architecture, calibration, config, checkpoint.dtypes)
        numbers = sizes.ssm_numbers // sizes.d_state * count
        bytes_of = {"float32": 4 * numbers, "int8": numbers + 2 * numbers // sizes.scale_channels}
        for dtype, size in bytes_of.items():
            _, losses = losses_of_tokens(use_fast_scan(model, state_dtype=dtype, each_token=True), text, args.window)
            found = loss_by_kind(losses.numpy(), kinds, dense.numpy())
            excess = excess_loss(summarise(windows, losses), summarise(windows, dense))
            row = {"states": count, "state_dtype": dtype, "bytes": size, "times_fewer": whole / size}
            row |= {"excess_nats": excess.nats, "stderr": excess.stderr}
            row["recall"] = {k.kind: {"excess": k.excess, "stderr": k.excess_stderr} for k in found if k.kind in RECALL}
            rows.append(row)
            print(f"{count} states in {dtype}: {excess.nats:+.5f}, {whole / size:.2f} times fewer bytes", flush=True)
    return rows


def show(report: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(width=150)
    lengths = list(dict.fromkeys(row["length"] for row in report["lengths"]))
    table = Table(title=f"{report['model']}: excess nats by length of the text")
    for heading in ("states", *(f"{length} tokens" for length in lengths)):
        table.add_column(heading, justify="left" if heading == "states" else "right")
    for name in FORMS:
        rows = [row for row in report["lengths"] if row["form"] == name]
        table.add_row(name, *(_with_error(row, 5) for row in rows))
    console.print(table)
    table = Table(title=f"{report['model']}: states removed and rounded, {report['settings']['window']} tokens")
    for heading in ("states", "kept in", "bytes a sequence", "times fewer", "excess nats", *RECALL[1:]):
        table.add_column(heading, justify="right")
    for row in report["pruned"]:
        kinds = [row["recall"][kind]["excess"] for kind in RECALL[1:]]
        spread = _with_error(row, 4)
        first = (str(row["states"]), row["state_dtype"], format_bytes(row["bytes"]), f"{row['times_fewer']:.2f}")
        table.add_row(*first, spread, *("" if kind is None else f"{kind:+.4f}" for kind in kinds))
    console.print(table)


def _with_error(row: dict[str, Any], digits: int) -> str:
    """The excess and its standard error, which a single window has not."""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.{digits}f}"
    return f"{row['excess_nats']:+.{digits}f}{error}"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ssmc"
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in FORMS:
        rows = [row for row in report["lengths"] if row["form"] == name]
        spread = [row["stderr"] or 0 for row in rows]
        axes.errorbar(
            [row["length"] for row in rows],
            [row["excess_nats"] for row in rows],
            spread,
            label=name,
            marker="o",
            capsize=3,
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens of a window", ylabel="excess loss (nats a token)")
    axes.set_xticks([row["length"] for row in rows], [str(row["length"]) for row in rows])
    axes.minorticks_off()
    axes.set_title(f"{report['model']}: states rounded after every token")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
