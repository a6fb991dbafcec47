"""Speed where people run it: dense beside pruned in other people's software, and in ours.

    python -m benchmarks.speed.consumers --work build/speed --json benchmarks/results/consumers_speed.json
    python -m benchmarks.speed.consumers tiny-mamba2 --kept dense "column 0.5" "channel 0.5" --runtime llama-cpp
    python -m benchmarks.speed.consumers MODEL --calib train.jsonl --text valid.jsonl
    python -m benchmarks.speed.consumers --show --plot --json benchmarks/results/consumers_speed.json

Each runtime runs in the environment that `make consumers` made for it, one process for each model, all loaded before
the first is timed; within a runtime the models take turns, so what else the machine does falls on all alike. The
processes are started several times: how a process lies in memory can change its speed by a fifth, and stays with it.
Figures are medians of the rounds with their quartiles, and the ratio to the dense model round by round with the
interval of its median. llama.cpp tells its own clock; of the others the calls are timed. With --cpu-time the
processor time of a runtime's process counts, which other work on the machine disturbs less. Prefill ends with the
logits of the last token. Loss is nats a token above the dense model's, on held-out text: of the pruned model in
float32, and what quantisation adds to that, which the export measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.reporting import FIGURES, print_conditions
from benchmarks.speed.consumers_report import DENSE, PHASES, merged, plot, read_records, show
from consumers.asking import Consumer, ConsumerError
from consumers.environments import KINDS, Kind, python_of
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.manifest import read_manifest
from ssmc.runtime.measure.conditions import load_average
from ssmc.runtime.measure.perplexity import excess_loss, perplexity
from ssmc.runtime.measure.timing import Timing, paired_ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

KEPT = (DENSE, "column 0.5", "column 0.75", "column 0.875", "channel 0.25", "quantised", "column 0.875 quantised")
OURS = Kind("ssmc", "ssmc", "ssmc", "ask_ssmc.py", "safetensors", "", dense=True)
RUNTIMES = {kind.name: kind for kind in (*KINDS, OURS)}
QUANTISED = {"gguf": {"quantize": "q8_0"}, "onnx": {"quantize": "int8"}}
WINDOW = 1024  # tokens that a loss is measured over


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--runtime", action="append", choices=list(RUNTIMES), help="all unless given")
    parser.add_argument("--kept", nargs="+", default=KEPT, help='"PATTERN SPARSITY", "quantised" or both')
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded behind it")
    parser.add_argument("--rounds", type=int, default=9, help="in all")
    parser.add_argument("--starts", type=int, default=3, help="of the processes; the rounds are spread over them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the runtime's process")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--work", type=Path, help="keep pruned models, exports and losses here for another run")
    parser.add_argument("--json", type=Path, help="earlier runs of other models and runtimes stay in it")
    parser.add_argument("--plot", action="store_true", help="write docs/figures/consumers.svg, of all runs in --json")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what --json holds")
    args = parser.parse_args()
    if (args.show or args.plot) and args.json is None:
        parser.error("--show and --plot are of the file that --json names")
    if args.show and not args.json.is_file():
        parser.error(f"there is no {args.json} to show")
    return args


class Models:
    """The dense model and pruned ones, their exports and their losses, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder / Path(args.model).name
        self.folder.mkdir(parents=True, exist_ok=True)

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
        own = QUANTISED[kind.format] if quantised else {}
        options = dict(kind.options) | own
        out = self.folder / "exports" / "-".join([*kept.split(), kind.format, *options.values()])
        if not out.is_dir():
            text = {"text": self.args.text} if quantised else {}
            export(masked, format=kind.format, out=out, **options, **text)
        return out

    def loss(self, kept: str) -> dict[str, float]:
        """Nats a token above the dense model, with their standard error where there is more than one window."""
        path = self.folder / "losses.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        cut = kept.replace(" quantised", "").replace("quantised", DENSE)
        if cut not in known:
            found = excess_loss(self._perplexity(self.masked(cut)), self._perplexity(self.args.model))
            path.write_text(json.dumps(known | {cut: asdict(found)}), encoding="utf-8")
            return asdict(found)
        return known[cut]

    def _perplexity(self, source: str | Path) -> Any:
        checkpoint = load_checkpoint(source, dtype=torch.float32)
        stream = tokenize(read_texts(self.args.text), load_tokenizer(checkpoint))[: self.args.max_tokens]
        return perplexity(use_fast_scan(checkpoint.model), stream, WINDOW)


def time_runtime(kind: Kind, models: Models, tokens: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Every model in one runtime, in turns.

    Returns:
        Its versions, rows as `as_rows` makes them, and why models are missing.

    Raises:
        ConsumerError: there is no such environment, or a model ended while it was timed.
    """
    python = Path(sys.executable) if kind is OURS else python_of(kind.name)
    folders, missing = exports(kind, models, args.kept)
    rounding = {kept: _rounding(folder, kind) if "quantised" in kept else 0.0 for kept, folder in folders.items()}
    samples: dict[str, dict[str, list[float]]] = {phase: {kept: [] for kept in folders} for phase in PHASES}
    versions: dict[str, str] = {}
    for start in range(args.starts):
        with ExitStack() as stack:
            running: dict[str, Consumer] = {}
            for kept, folder in list(folders.items()):
                try:
                    consumer = stack.enter_context(Consumer(python, kind.script, folder, threads=args.threads))
                    consumer.time(tokens, args.new, processor=args.cpu_time)  # warms up
                    running[kept], versions = consumer, consumer.versions
                except SsmcError as error:
                    missing[kept] = str(error)
                    del folders[kept]
            for number in range(start, args.rounds, args.starts):
                for kept in list(running) if number % 2 else reversed(running):
                    for phase, seconds in running[kept].time(tokens, args.new, processor=args.cpu_time).items():
                        samples[phase][kept].append(seconds)
    ran = {phase: {kept: found[kept] for kept in folders} for phase, found in samples.items()}
    return {"versions": versions, "missing": missing, "rows": as_rows(ran, models, rounding)}


def exports(kind: Kind, models: Models, names: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of a runtime's exports, without those its format has no quantisation for, and why others are none."""
    folders, missing = {}, {}
    for kept in names:
        try:
            folder = models.exported(kept, kind)
        except SsmcError as error:
            missing[kept] = str(error)
            continue
        if folder is not None:
            folders[kept] = folder
    return folders, missing


def _rounding(folder: Path, kind: Kind) -> float:
    """Nats a token that quantisation adds, as the export found."""
    about = read_manifest(folder).about
    return about.get(kind.format if kind.format == "gguf" else "", about)["perplexity"]["excess_nats"]


def as_rows(samples: dict[str, Any], models: Models, rounding: dict[str, float]) -> list[dict[str, Any]]:
    """One row for a model: seconds, their quartiles, how many times the dense model takes as long, and the loss."""
    timings = {phase: {kept: Timing(tuple(found)) for kept, found in samples[phase].items()} for phase in PHASES}
    rows = []
    for kept in timings[PHASES[0]]:
        loss = models.loss(kept)
        row: dict[str, Any] = {"kept": kept, "loss": loss | {"nats": loss["nats"] + rounding[kept]}}
        for phase, own in timings.items():
            timing = own[kept]
            row[phase] = {"median_s": timing.median, "quartiles_s": timing.quartiles, "samples_s": timing.seconds}
            if DENSE in own:
                row[phase]["times_faster_than_dense"] = asdict(paired_ratio(own[DENSE], timing))
        rows.append(row)
    return rows


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A record for each runtime, as it comes."""
    torch.set_num_threads(args.threads)
    now, models = print_conditions(), Models(args, folder)
    generator = torch.Generator().manual_seed(0)
    vocabulary = load_checkpoint(args.model).config.vocab_size
    tokens = torch.randint(1, vocabulary - 1, (args.length,), generator=generator).tolist()
    settings = {name: getattr(args, name) for name in ("length", "new", "rounds", "starts", "threads", "cpu_time")}
    settings |= {name: getattr(args, name) for name in ("nsamples", "seqlen", "max_tokens")}
    for name in args.runtime or RUNTIMES:
        kind = RUNTIMES[name]
        try:
            found = time_runtime(kind, models, tokens, args)
        except ConsumerError as error:
            found = {"versions": {}, "missing": {"all": str(error)}, "rows": []}
        record = {"model": Path(args.model).name, "runtime": kind.title, "conditions": asdict(now)}
        yield record | {"load_after": load_average(), "settings": settings} | found


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    records = read_records(args.json)
    if not args.show:
        with TemporaryDirectory() as name:
            for record in measure(args, args.work or Path(name)):
                show([record])
                records = merged(records, [record])
                if args.json is not None:  # what was found stays, whatever comes
                    args.json.write_text(json.dumps({"records": records}, indent=1) + "\n", encoding="utf-8")
    else:
        show(records)
    if args.plot:
        plot(records, FIGURES / "consumers.svg")


if __name__ == "__main__":
    main()
