"""Speed where people run it: dense beside pruned in other people's software, and in ours.

    python -m benchmarks.speed.consumers --json benchmarks/results/consumers_speed.json
    python -m benchmarks.speed.consumers MODEL --calib train.jsonl --text valid.jsonl --runtime llama-cpp --runtime ssmc
    python -m benchmarks.speed.consumers tiny-mamba2 --kept "dense" "column 0.5" "channel 0.25" "column 0.5 quantised"

Each runtime runs in the environment that `make consumers` made for it, one process for each model, all loaded before
the first is timed; within a runtime the models take turns, so what else the machine does falls on all alike. Figures
are medians of the rounds with their quartiles, and the ratio to the dense model round by round with the interval of
its median. llama.cpp tells its own clock; of the others the calls are timed. With --cpu-time the processor time of a
runtime's process counts, which other work on the machine disturbs less. Prefill ends with the logits of the last
token. Loss is nats a token above the dense model's, on held-out text, of the float32 model: quantisation's own comes on
top.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.reporting import FIGURES, print_conditions
from consumers.asking import Consumer, ConsumerError
from consumers.environments import KINDS, Kind, python_of
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure.conditions import load_average
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.measure.timing import Timing, paired_ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

matplotlib.use("svg")

DENSE = "dense"
KEPT = (DENSE, "column 0.5", "column 0.75", "column 0.875", "channel 0.25", "quantised", "column 0.875 quantised")
PHASES = ("prefill", "decode")
OURS = Kind("ssmc", "ssmc", "ssmc", "ask_ssmc.py", "safetensors", "", dense=True)
RUNTIMES = {kind.name: kind for kind in (*KINDS, OURS)}
QUANTISED = {"gguf": {"quantize": "q8_0"}, "onnx": {"quantize": "int8"}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--runtime", action="append", choices=list(RUNTIMES), help="all unless given")
    parser.add_argument("--kept", nargs="+", default=KEPT, help='"PATTERN SPARSITY", "quantised" or both')
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded behind it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the runtime's process")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="write docs/figures/consumers.svg")
    return parser.parse_args()


class Models:
    """The dense model and pruned ones, their exports and their losses, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder

    def masked(self, kept: str) -> str | Path:
        """What holds the masked model; the dense one itself where nothing is pruned."""
        cut = kept.replace("quantised", "").split()
        if cut in ([], [DENSE]):
            return self.args.model
        pattern, sparsity = cut
        out = self.folder / "-".join(cut)
        if not out.is_dir():
            few = {"nsamples": self.args.nsamples, "seqlen": self.args.seqlen, "calib": self.args.calib}
            compress(self.args.model, out=out, pattern=pattern, sparsity=float(sparsity), **few)
        return out

    def exported(self, kept: str, kind: Kind) -> Path | None:
        """The folder of an export; None where the format has no quantisation.

        Raises:
            SsmcError: the model does not go into the format.
        """
        masked, quantised = self.masked(kept), "quantised" in kept
        if quantised and kind.format not in QUANTISED:
            return None
        if masked == self.args.model and kind.dense:
            return find_directory(masked)
        options = dict(kind.options) | (QUANTISED[kind.format] if quantised else {})
        out = self.folder / "exports" / "-".join([*kept.split(), kind.format, *options.values()])
        if not out.is_dir():
            export(masked, format=kind.format, out=out, **options)
        return out

    def loss(self, kept: str) -> dict[str, float]:
        """Excess loss in nats a token, with its standard error where there is more than one window."""
        found = excess_loss(self._perplexity(self.masked(kept)), self._perplexity(self.args.model))
        return asdict(found)

    def _perplexity(self, source: str | Path) -> Any:
        checkpoint = load_checkpoint(source, dtype=torch.float32)
        stream = tokenize(read_texts(self.args.text), load_tokenizer(checkpoint))[: self.args.max_tokens]
        return perplexity(use_fast_scan(checkpoint.model), stream, 1024)


def time_runtime(kind: Kind, models: Models, tokens: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Every model in one runtime, in turns.

    Returns:
        Its versions, the timings of each phase by model, and why models are missing.
    """
    python = Path(sys.executable) if kind is OURS else python_of(kind.name)
    found: dict[str, Any] = {"versions": {}, "missing": {}, "timings": {phase: {} for phase in PHASES}}
    with ExitStack() as stack:
        running = {}
        for kept in args.kept:
            try:
                folder = models.exported(kept, kind)
                if folder is None:
                    continue
                consumer = Consumer(python, kind.script, folder, threads=args.threads)
                running[kept] = stack.enter_context(consumer)
                consumer.time(tokens, args.new, processor=args.cpu_time)  # warms up
            except SsmcError as error:
                running.pop(kept, None)
                found["missing"][kept] = str(error)
        for consumer in running.values():
            found["versions"] = consumer.versions
        samples = {phase: {kept: [] for kept in running} for phase in PHASES}
        for number in range(args.rounds):
            for kept in list(running) if number % 2 else reversed(running):
                for phase, seconds in running[kept].time(tokens, args.new, processor=args.cpu_time).items():
                    samples[phase][kept].append(seconds)
    for phase in PHASES:
        found["timings"][phase] = {kept: Timing(tuple(seconds)) for kept, seconds in samples[phase].items()}
    return found


def as_rows(kind: Kind, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for a runtime and model: seconds, their quartiles, and how many times the dense model takes as long."""
    rows = []
    for kept in found["timings"]["prefill"]:
        row: dict[str, Any] = {"runtime": kind.title, "versions": found["versions"], "kept": kept}
        for phase, timings in found["timings"].items():
            timing = timings[kept]
            row[phase] = {"median_s": timing.median, "quartiles_s": timing.quartiles, "samples_s": timing.seconds}
            if DENSE in timings:
                row[phase]["times_faster_than_dense"] = asdict(paired_ratio(timings[DENSE], timing))
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], losses: dict[str, dict[str, float]]) -> None:
    """The table."""
    table = Table("runtime", "kept", "prefill ms", "x dense", "decode ms", "x dense", "loss, nats")
    for row in rows:
        cells = []
        for phase in PHASES:
            low, high = (1e3 * q for q in row[phase]["quartiles_s"])
            ratio = row[phase].get("times_faster_than_dense")
            cells.append(f"{1e3 * row[phase]['median_s']:.2f} ({low:.2f} .. {high:.2f})")
            cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})" if ratio else "")
        table.add_row(row["runtime"], row["kept"], *cells, f"{losses[row['kept']]['nats']:+.4f}")
    Console(width=160).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times as fast as the dense model, by runtime and phase."""
    import matplotlib.pyplot as plt
    import numpy as np

    matplotlib.rcParams["svg.hashsalt"] = "consumers"
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    kept = list(dict.fromkeys(row["kept"] for row in rows if row["kept"] != DENSE))
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, phase in zip(axes, PHASES, strict=True):
        for number, cut in enumerate(kept):
            own = {row["runtime"]: row[phase]["times_faster_than_dense"] for row in rows if row["kept"] == cut}
            places = [i for i, name in enumerate(runtimes) if name in own]
            ratios = [own[runtimes[i]] for i in places]
            heights = [ratio["median"] for ratio in ratios]
            errors = [[max(0.0, r["median"] - r["low"]) for r in ratios], [r["high"] - r["median"] for r in ratios]]
            width = 0.8 / len(kept)
            axis.bar(np.array(places) + width * number - 0.4, heights, width, label=cut, yerr=errors, align="edge")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel(f"{phase}, times as fast as dense")
    axes[1].set_xticks(range(len(runtimes)), runtimes)
    axes[0].legend(fontsize="small", ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    torch.set_num_threads(args.threads)
    now, rows, missing = print_conditions(), [], {}
    generator = torch.Generator().manual_seed(0)
    vocabulary = load_checkpoint(args.model).config.vocab_size
    tokens = torch.randint(1, vocabulary - 1, (args.length,), generator=generator).tolist()
    with TemporaryDirectory() as name:
        models = Models(args, Path(name))
        losses = {kept: models.loss(kept) for kept in args.kept}
        for name in args.runtime or RUNTIMES:
            kind = RUNTIMES[name]
            try:
                found = time_runtime(kind, models, tokens, args)
            except ConsumerError as error:
                missing[kind.title] = {"all": str(error)}
                continue
            rows += as_rows(kind, found)
            missing |= {kind.title: found["missing"]} if found["missing"] else {}
    show(rows, losses)
    for runtime, reasons in missing.items():
        for kept, reason in reasons.items():
            print(f"{runtime}, {kept}: {reason}")
    if args.plot:
        plot(rows, FIGURES / "consumers.svg")
    if args.json is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "calib", "text")}
        settings["model"] = Path(args.model).name
        record = {"conditions": asdict(now), "load_after": load_average(), "settings": settings, "losses": losses}
        record |= {"rows": rows, "missing": missing}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
