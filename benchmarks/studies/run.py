"""The paper's tables, ablations and two checks of its assumptions, made anew on any Mamba-1 model with one command.

    python -m benchmarks.studies.run  # the embedded model and its texts: minutes
    python -m benchmarks.studies.run MODEL --calib wikitext2 --text wikitext2 --nsamples 64 --seqlen 2048 --window 2048
    python -m benchmarks.studies.run --only uniformity,rare  # the constructed layers alone, no model

Writes OUT/STUDY.json for every study that ran and rebuilds PAGES/README.md with its plots from all that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.studies.layers import RARE, Rare, Uniformity, rare_cells, rare_rows, uniformity_cells, uniformity_rows
from benchmarks.studies.models import (
    SAMPLES,
    Subject,
    aggregation_cells,
    alpha_cells,
    measure,
    methods_cells,
    samples_cells,
)
from benchmarks.studies.pages import PAGES, rebuild
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.files import write_text
from ssmc.runtime.measure.conditions import conditions, load_average
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.progress import Progress as Report
from ssmc.runtime.text import Texts, read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

STUDIES = tuple(PAGES)
CONSTRUCTED = ("uniformity", "rare")


@dataclass(frozen=True)
class Work:
    """A study as a list of cells, each of which makes rows."""

    cells: list[Any]
    rows: Callable[[Any, Report], list[dict]]
    settings: dict[str, Any]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--calib", default=calibration_path(), help="calibration text; a data set's train split")
    parser.add_argument("--text", default=heldout_path(), help="held-out text; a data set's test split")
    parser.add_argument("--tokenizer")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512, help="tokens of a held-out window")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows, 0 for all the text")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of the study methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", default=",".join(STUDIES), help=f"some of {','.join(STUDIES)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/studies"), help="for the JSON")
    parser.add_argument("--pages", type=Path, default=Path("docs/studies"), help="for the page and its plots")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in STUDIES]:
        parser.error(f"there is no study {unknown[0]!r}; there are {', '.join(STUDIES)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    @cache  # the constructed layers need no model
    def subject() -> tuple[Subject, dict]:
        return read_subject(args)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, transient=True) as bar:
            for name in args.only:
                write_text(args.out / f"{name}.json", as_json(run(name, args, subject, bar)))
                print(f"{name}: {rebuild(args.out, args.pages)}")
    except SsmcError as error:
        sys.exit(str(error))


def run(name: str, args: argparse.Namespace, subject: Callable[[], tuple[Subject, dict]], bar: Progress) -> dict:
    """Carry out one study; everything its page needs."""
    load, start = load_average(), time.perf_counter()
    work = constructed(name) if name in CONSTRUCTED else on_model(name, args, *subject())
    outer, inner = bar.add_task(name, total=len(work.cells)), bar.add_task("", total=None)

    def report(description: str, done: int, total: int) -> None:
        bar.update(inner, description=f"  {description}", completed=done, total=total)

    rows = []
    for cell in work.cells:
        rows += work.rows(cell, report)
        bar.advance(outer)
    bar.remove_task(inner)
    device = torch.device("cpu") if name in CONSTRUCTED else choose_device(args.device)
    return {
        "study": name,
        "command": command(name, args),
        "settings": work.settings,
        "seconds": round(time.perf_counter() - start, 1),
        "conditions": asdict(conditions(device, torch.float32, load)),
        "rows": rows,
    }


def as_json(study: dict) -> str:
    """One row a line, eight significant digits: small enough to commit."""
    rows = ",\n  ".join(json.dumps(_rounded(row)) for row in study["rows"])
    head = json.dumps(_rounded({k: v for k, v in study.items() if k != "rows"}), indent=1)
    return head.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def constructed(name: str) -> Work:
    """A study of layers made for it."""
    if name == "uniformity":
        study = Uniformity()
        return Work(uniformity_cells(study), lambda cell, _: uniformity_rows(study, *cell), asdict(study))
    rare = Rare()
    return Work(rare_cells(rare), lambda cell, _: rare_rows(rare, *cell), {**asdict(rare), "rare_state": RARE})


def on_model(name: str, args: argparse.Namespace, subject: Subject, settings: dict) -> Work:
    """A study of the user's model."""
    cells = {
        "methods": lambda: methods_cells(args.sparsities),
        "aggregation": aggregation_cells,
        "samples": lambda: samples_cells(len(subject.pool)),
        "alpha": alpha_cells,
    }[name]()
    if name == "samples":
        settings = settings | {"nsamples": max(cell.nsamples for cell in cells)}
    return Work(cells, lambda cell, report: measure(subject, cell, report), settings)


def read_subject(args: argparse.Namespace) -> tuple[Subject, dict]:
    """The dense model, its texts and its perplexity, and what the page tells of them."""
    checkpoint = load_checkpoint(str(args.model), dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint, args.tokenizer)
    most = max((args.nsamples, *(SAMPLES if "samples" in args.only else ())))
    heldout = read_texts(args.text, split="test")
    calibration = draw_samples(args.calib, tokenizer, most, args.seqlen, args.seed)
    text = tokenize(heldout, tokenizer)[: args.windows * args.window or None]
    device = choose_device(args.device)
    model = use_fast_scan(checkpoint.model.to(device))
    dense = perplexity(model, text, args.window)
    pool = calibration.tokens.to(device)
    subject = Subject(checkpoint, pool, text, args.window, dense, min(args.nsamples, len(pool)), args.seed)
    settings = {
        "model": public(args.model),
        "size": subject.size,
        "dimensions": checkpoint.dimensions.as_dict(),
        "calibration": {"source": calibration.source, "sha256": calibration.sha256},
        "nsamples": subject.nsamples,
        "seqlen": args.seqlen,
        "text": _told(heldout),
        "window": dense.window,
        "windows": dense.windows,
        "seed": args.seed,
        "dense_perplexity": dense.ppl,
        "dense_window_nll": list(dense.window_nll),
    }
    return subject, settings


def _told(texts: Texts) -> dict[str, str]:
    return {"source": public(texts.source), "sha256": texts.sha256}


def public(source: str | Path) -> str:
    """What a page may call a model or text: its last name if it is a path of this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def command(name: str, args: argparse.Namespace) -> str:
    """What to type to make this study again."""
    words = ["python", "-m", "benchmarks.studies.run", "--only", name]
    if name not in CONSTRUCTED:
        words.insert(2, public(args.model))
        for option in ("nsamples", "seqlen", "window", "windows", "seed"):
            words += [f"--{option}", str(getattr(args, option))]
        given = {"calib": calibration_path(), "text": heldout_path(), "tokenizer": None}
        for option, default in given.items():
            if getattr(args, option) != default:
                words += [f"--{option}", public(getattr(args, option))]
    if name == "methods":
        words += ["--sparsities", *(f"{s:g}" for s in args.sparsities)]
    return " ".join(words)


if __name__ == "__main__":
    main()
