"""What pruning states does to recall: models that solve MQAR, every score, states kept, with and without repair.

    python -m benchmarks.recall --work work/recall  # trains both models if they are not there yet; some minutes
    python -m benchmarks.recall --work work/recall --quick  # fewer scores and questions

Multi-query associative recall (`ssmc.runtime.measure.mqar`) needs nothing but memory, so its accuracy shows at once
what perplexity hides. Models are trained on one core in minutes (`benchmarks.models.make_mqar`, where the Mamba-2
solves the task and the Mamba-1 does not yet), then lose states of all layers in one shot, calibrated on sequences of
the task that no question comes from. Errors are standard errors over sequences.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models.make_mqar import LENGTH, PAIRS, STEPS, TASK, VOCAB, train
from benchmarks.pruning import pruned
from benchmarks.reporting import FIGURES, print_conditions
from ssmc.compressor import configure
from ssmc.compressor.options.patterns import COLUMN, UNSTRUCTURED, scores_of
from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure.mqar import Questions, ask, right_answers, summarised
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan

EDGES = (16, 32, 48)
SPARSITIES = (0.5, 0.75, 0.875)
DEFAULT, PLAIN = ("exact", True), ("ghost", False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that trained models are kept in")
    parser.add_argument("--models", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--sequences", type=int, default=512, help="of the questions, eight in each")
    parser.add_argument("--calibration", type=int, default=256, help="sequences")
    parser.add_argument("--refine", type=int, default=0, help="gradient steps on each layer, where there is a repair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two scores, a fourth of the questions")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall.json"))
    return parser.parse_args()


def trained(kind: str, args: argparse.Namespace) -> tuple[Checkpoint, float | None]:
    """The model, and how long its training took on the CPU; None where it was there."""
    place, seconds = args.work / f"mqar-{kind}-{args.seed}", None
    if not place.exists():
        start = time.process_time()
        model = train(kind, args.seed, show=True)
        seconds = time.process_time() - start
        model.save_pretrained(place)
    return load_checkpoint(place, dtype=torch.float32), seconds


def cases(quick: bool) -> Iterator[dict[str, Any]]:
    """Options of a run."""
    scores = (PLAIN[0], DEFAULT[0]) if quick else scores_of(COLUMN)
    for sparsity in SPARSITIES:
        for score in scores:
            for repair in (False, True):
                yield {"pattern": COLUMN, "score": score, "sparsity": sparsity, "repair": repair}
    for score in () if quick else scores_of(UNSTRUCTURED):
        for form in ("zero", "forget"):
            yield {"pattern": UNSTRUCTURED, "score": score, "sparsity": 0.5, "pruned_entry": form}


def measured(checkpoint: Checkpoint, questions: Questions, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Accuracy of all questions first, then by distance."""
    right = right_answers(use_fast_scan(model), questions)
    return [asdict(answers) for answers in summarised(questions, right, EDGES)]


def run(kind: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything about one model, again with every row that is added."""
    checkpoint, seconds = trained(kind, args)
    use_fast_scan(checkpoint.model)
    generator = torch.Generator().manual_seed(args.seed + 1000)  # training has args.seed + 1
    calibration = ask(TASK, args.calibration, generator).tokens
    questions = ask(TASK, args.sequences // (4 if args.quick else 1), generator)
    found = {
        "dense": measured(checkpoint, questions, checkpoint.model),
        "d_state": checkpoint.dimensions.d_state,
        "parameters": checkpoint.parameters,
        "training_cpu_seconds": seconds,
        "rows": [],
    }
    for options in cases(args.quick):
        model, start = copy.deepcopy(checkpoint.model), time.process_time()
        shape = {"nsamples": len(calibration), "seqlen": LENGTH}
        steps = args.refine if options.get("repair") else 0
        config = configure(model=f"mqar-{kind}", seed=args.seed, refine=steps, **shape, **options)
        try:
            pruned(model, checkpoint.architecture, calibration, config, checkpoint.dtypes)
        except UsageError:  # a score that cannot decide about this family
            continue
        spent = time.process_time() - start
        answers = measured(checkpoint, questions, model)
        found["rows"].append({"options": options, "cpu_seconds": spent, "answers": answers})
        print(f"{kind}: {describe(options)}: {answers[0]['accuracy']:.1%}", flush=True)
        yield found


def describe(options: dict[str, Any]) -> str:
    """A run in a few words."""
    tail = options.get("pruned_entry") or ("repaired" if options["repair"] else "not repaired")
    return f"{options['pattern']} {options['sparsity']:.1%}, {options['score']}, {tail}"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "models": {}}
    names = ("sequences", "calibration", "refine", "seed", "quick")
    report["settings"] = {name: getattr(args, name) for name in names} | {
        "vocab": VOCAB,
        "pairs": PAIRS,
        "length": LENGTH,
        "edges": EDGES,
    }
    for kind in args.models:
        for found in run(kind, args):
            report["models"][kind] = found
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind, found in report["models"].items():
        print_tables(kind, found)
    plot(report, FIGURES / f"{args.out.stem}.svg")


def print_tables(kind: str, found: dict[str, Any]) -> None:
    """Accuracy by score and states kept, and of entries of A_log."""
    dense, cells = found["dense"][0]["accuracy"], by_options(found)
    columns = [f"{s:.1%}{' + repair' if repair else ''}" for s in SPARSITIES for repair in (False, True)]
    table = Table("score", *columns, title=f"{kind}: right answers; dense {dense:.1%}, states removed")
    for score in dict.fromkeys(score for pattern, score, *_ in cells if pattern == COLUMN):
        row = [cells.get((COLUMN, score, s, repair)) for s in SPARSITIES for repair in (False, True)]
        table.add_row(score, *(_cell(answers) for answers in row))
    Console(width=140).print(table)
    forms = ("zero", "forget")
    table = Table("score", *forms, title=f"{kind}: half of the entries of A_log")
    for score in dict.fromkeys(score for pattern, score, *_ in cells if pattern == UNSTRUCTURED):
        table.add_row(score, *(_cell(cells.get((UNSTRUCTURED, score, 0.5, form))) for form in forms))
    Console(width=140).print(table)


def by_options(found: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    """Answers by pattern, score, sparsity, and repair or form."""
    rows = [(row["options"], row["answers"]) for row in found["rows"]]
    return {
        (o["pattern"], o["score"], o["sparsity"], o["repair"] if "repair" in o else o["pruned_entry"]): answers
        for o, answers in rows
    }


def _cell(answers: list[dict[str, Any]] | None) -> str:
    return "" if answers is None else f"{answers[0]['accuracy']:.1%} ± {answers[0]['stderr']:.1%}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy over states kept for every score, and over distance for some; a row for each model."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ssmc"
    models = report["models"]
    figure, axes = plt.subplots(len(models), 2, figsize=(9, 3.4 * len(models)), squeeze=False)
    for (kind, found), (left, right) in zip(models.items(), axes, strict=True):
        cells = by_options(found)
        _plot_kept(left, found, cells)
        _plot_distance(right, found, cells)
        left.set(title=f"{kind}: all questions", xlabel=f"states kept of {found['d_state']}", ylabel="right answers")
        right.set(title=f"{kind}: half of the states", xlabel="tokens back", ylabel="right answers")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _plot_kept(axis: Any, found: dict[str, Any], cells: dict[tuple, list[dict[str, Any]]]) -> None:
    d_state = found["d_state"]
    for i, score in enumerate(dict.fromkeys(key[1] for key in cells if key[0] == COLUMN)):
        for repair, style in ((False, "--"), (True, "-")):
            row = [(s, cells[COLUMN, score, s, repair]) for s in SPARSITIES if (COLUMN, score, s, repair) in cells]
            points = [(d_state, found["dense"]), *((round(d_state * (1 - s)), answers) for s, answers in row)]
            label = score if repair else None
            kept, accuracy = [p[0] for p in points], [p[1][0]["accuracy"] for p in points]
            axis.plot(kept, accuracy, style, color=f"C{i}", marker=".", label=label)
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=6, title="solid: with repair", title_fontsize=6)


def _plot_distance(axis: Any, found: dict[str, Any], cells: dict[tuple, list[dict[str, Any]]]) -> None:
    shown = {"dense": found["dense"]}
    shown |= {
        f"{score}{' + repair' if repair else ''}": cells[COLUMN, score, 0.5, repair]
        for score, repair in (DEFAULT, ("ghost", True), PLAIN, ("sparsessm-vote", False))
        if (COLUMN, score, 0.5, repair) in cells
    }
    for label, answers in shown.items():
        middle = [(a["low"] + a["high"]) / 2 for a in answers[1:]]
        heights, errors = ([a[key] for a in answers[1:]] for key in ("accuracy", "stderr"))
        axis.errorbar(middle, heights, errors, marker=".", label=label)
    axis.legend(fontsize=6)


if __name__ == "__main__":
    main()
