"""What pruning states does to recall: models that solve MQAR, every score, states kept, with and without repair.

    python -m benchmarks.recall --work work/recall  # trains both models if they are not there yet; some minutes
    python -m benchmarks.recall --work work/recall --quick  # fewer scores and questions
    python -m benchmarks.recall --work work/recall --seeds 0 1 2 --quick  # several models of each kind

Multi-query associative recall (`ssmc.runtime.measure.mqar`) needs nothing but memory, so its accuracy shows at once
what perplexity hides. Models are trained on one core within a minute (`benchmarks.models.make_mqar`), then lose states
of all layers in one shot, calibrated on sequences of the task that no question comes from. Errors are standard errors
over sequences; with several seeds, each of a model of its own, of the mean over models.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
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
UNREPAIRED, REPAIRED = "no repair", "repair"
DEFAULT, PLAIN = ("exact", REPAIRED), ("ghost", UNREPAIRED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that trained models are kept in")
    parser.add_argument("--models", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--sequences", type=int, default=512, help="of the questions, eight in each")
    parser.add_argument("--calibration", type=int, default=1024, help="sequences")
    parser.add_argument("--refine", type=int, default=300, help="gradient steps on each layer, of exact, in more rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of models, questions and calibration")
    parser.add_argument("--quick", action="store_true", help="two scores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall.json"))
    return parser.parse_args()


def trained(kind: str, seed: int, work: Path) -> tuple[Checkpoint, float | None]:
    """The model, and how long its training took on the CPU; None where it was there."""
    place, seconds = work / f"mqar-{kind}-{seed}", None
    if not place.exists():
        start = time.process_time()
        model = train(kind, seed, show=True)
        seconds = time.process_time() - start
        model.save_pretrained(place)
    return load_checkpoint(place, dtype=torch.float32), seconds


def cases(quick: bool, refine: int) -> Iterator[dict[str, Any]]:
    """Options of a run."""
    scores = (PLAIN[0], DEFAULT[0]) if quick else scores_of(COLUMN)
    for sparsity in SPARSITIES:
        for score in scores:
            for repair in (False, True):
                yield {"pattern": COLUMN, "score": score, "sparsity": sparsity, "repair": repair}
        if refine:
            yield {"pattern": COLUMN, "score": DEFAULT[0], "sparsity": sparsity, "repair": True, "refine": refine}
    for score in () if quick else scores_of(UNSTRUCTURED):
        for form in ("zero", "forget"):
            yield {"pattern": UNSTRUCTURED, "score": score, "sparsity": 0.5, "pruned_entry": form}


def measured(checkpoint: Checkpoint, questions: Questions, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Accuracy of all questions first, then by distance."""
    right = right_answers(use_fast_scan(model), questions)
    return [asdict(answers) for answers in summarised(questions, right, EDGES)]


def run(kind: str, seed: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything about one model, again with every row that is added."""
    checkpoint, seconds = trained(kind, seed, args.work)
    use_fast_scan(checkpoint.model)
    generator = torch.Generator().manual_seed(seed + 1000)  # training has seed + 1
    calibration = ask(TASK, args.calibration, generator).tokens
    questions = ask(TASK, args.sequences, generator)
    found = {
        "dense": measured(checkpoint, questions, checkpoint.model),
        "d_state": checkpoint.dimensions.d_state,
        "parameters": checkpoint.parameters,
        "training_cpu_seconds": seconds,
        "rows": [],
    }
    for options in cases(args.quick, args.refine):
        model, start = copy.deepcopy(checkpoint.model), time.process_time()
        config = configure(model=f"mqar-{kind}", seed=seed, nsamples=len(calibration), seqlen=LENGTH, **options)
        try:
            pruned(model, checkpoint.architecture, calibration, config, checkpoint.dtypes)
        except UsageError:  # a score that cannot decide about this family
            continue
        spent = time.process_time() - start
        answers = measured(checkpoint, questions, model)
        found["rows"].append({"options": options, "cpu_seconds": spent, "answers": answers})
        print(f"{kind} {seed}: {describe(options)}: {answers[0]['accuracy']:.1%}", flush=True)
        yield found


def way_of(options: dict[str, Any]) -> str:
    """What is done beside the choice: nothing, a repair, gradient steps; of entries their form."""
    if "repair" not in options:
        return options["pruned_entry"]
    if options.get("refine"):
        return f"{REPAIRED}, refine {options['refine']}"
    return REPAIRED if options["repair"] else UNREPAIRED


def describe(options: dict[str, Any]) -> str:
    """A run in a few words."""
    return f"{options['pattern']} {options['sparsity']:.1%}, {options['score']}, {way_of(options)}"


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over models of a kind: accuracies, and their errors."""
    if len(parts) == 1:
        return parts[0]
    rows = [
        row | {"answers": _mean([part["rows"][i]["answers"] for part in parts])}
        for i, row in enumerate(parts[0]["rows"][: min(len(part["rows"]) for part in parts)])
    ]
    return parts[0] | {"dense": _mean([part["dense"] for part in parts]), "rows": rows}


def _mean(answers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the same questions by distance, of several models; the error is that over models."""
    found = []
    for same in zip(*answers, strict=True):
        values = [a["accuracy"] for a in same]
        error = statistics.stdev(values) / math.sqrt(len(values))
        found.append(same[0] | {"accuracy": statistics.mean(values), "stderr": error})
    return found


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "models": {}, "seeds": {}}
    names = ("sequences", "calibration", "refine", "seeds", "quick")
    report["settings"] = {name: getattr(args, name) for name in names} | {
        "vocab": VOCAB,
        "pairs": PAIRS,
        "length": LENGTH,
        "edges": EDGES,
    }
    for kind in args.models:
        done: list[dict[str, Any]] = []
        for seed in args.seeds:
            done.append({})
            for found in run(kind, seed, args):
                done[-1] = found
                report["models"][kind], report["seeds"][kind] = together(done), done
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind, found in report["models"].items():
        print_tables(kind, found)
    plot(report, FIGURES / f"{args.out.stem}.svg")


def print_tables(kind: str, found: dict[str, Any]) -> None:
    """Accuracy by score and states kept, and of entries of A_log."""
    dense, cells = found["dense"][0]["accuracy"], by_options(found)
    ways = [UNREPAIRED, REPAIRED, *dict.fromkeys(key[3] for key in cells if "refine" in key[3])]
    columns = [f"{s:.1%}, {way}" for s in SPARSITIES for way in ways]
    table = Table("score", *columns, title=f"{kind}: right answers; dense {dense:.1%}, states removed")
    for score in dict.fromkeys(score for pattern, score, *_ in cells if pattern == COLUMN):
        table.add_row(score, *(_cell(cells.get((COLUMN, score, s, way))) for s in SPARSITIES for way in ways))
    Console(width=140).print(table)
    forms = ("zero", "forget")
    table = Table("score", *forms, title=f"{kind}: half of the entries of A_log")
    for score in dict.fromkeys(score for pattern, score, *_ in cells if pattern == UNSTRUCTURED):
        table.add_row(score, *(_cell(cells.get((UNSTRUCTURED, score, 0.5, form))) for form in forms))
    Console(width=140).print(table)


def by_options(found: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    """Answers by pattern, score, sparsity, and what else was done."""
    rows = [(row["options"], row["answers"]) for row in found["rows"]]
    return {(o["pattern"], o["score"], o["sparsity"], way_of(o)): answers for o, answers in rows}


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
    scores = list(dict.fromkeys(key[1] for key in cells if key[0] == COLUMN))
    styles = {UNREPAIRED: "--", REPAIRED: "-"}
    for score, way in dict.fromkeys((key[1], key[3]) for key in cells if key[0] == COLUMN):
        row = [(s, cells[COLUMN, score, s, way]) for s in SPARSITIES if (COLUMN, score, s, way) in cells]
        points = [(d_state, found["dense"]), *((round(d_state * (1 - s)), answers) for s, answers in row)]
        label = None if way == UNREPAIRED else score if way == REPAIRED else f"{score}, {way}"
        kept, (accuracy, errors) = (
            [p[0] for p in points],
            ([p[1][0][k] for p in points] for k in ("accuracy", "stderr")),
        )
        style, color = styles.get(way, ":"), f"C{scores.index(score)}"
        axis.errorbar(kept, accuracy, errors, ls=style, color=color, marker=".", label=label)
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=6, title="solid: with repair", title_fontsize=6)


def _plot_distance(axis: Any, found: dict[str, Any], cells: dict[tuple, list[dict[str, Any]]]) -> None:
    shown = {"dense": found["dense"]}
    refined = [(key[1], key[3]) for key in cells if key[2] == 0.5 and "refine" in key[3]]
    shown |= {
        f"{score}, {way}": cells[COLUMN, score, 0.5, way]
        for score, way in (DEFAULT, *refined, ("ghost", REPAIRED), PLAIN, ("sparsessm-vote", UNREPAIRED))
        if (COLUMN, score, 0.5, way) in cells
    }
    for label, answers in shown.items():
        middle = [(a["low"] + a["high"]) / 2 for a in answers[1:]]
        heights, errors = ([a[key] for a in answers[1:]] for key in ("accuracy", "stderr"))
        axis.errorbar(middle, heights, errors, marker=".", label=label)
    axis.legend(fontsize=6)


if __name__ == "__main__":
    main()
