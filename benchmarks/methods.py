"""Every method of this project side by side, at equal parameters and at equal time: loss, recall, a task, seconds.

    python -m benchmarks.methods            # the embedded models and a torch module, every group
    python -m benchmarks.methods --quick    # fewer methods, one seed, less text
    python -m benchmarks.methods --models tiny --groups states parameters
    python -m benchmarks.methods --jobs 16  # processes of one thread each

Groups of a table remove the same: as many states; as many parameters (channels, heads, layers, and what the search
takes of everything), to the next channel, head or layer; as much of the time of a prefill; or as many single weights,
which makes nothing smaller. "Excess" is the mean negative log-likelihood above the dense model's, in nats a token, on
held-out text; "recall" the same on tokens seen more than 100 tokens back; "task" how many questions of
`benchmarks.continuations` are answered rightly. Errors are standard errors over windows of text or questions, paired;
where there are several seeds (of the calibration samples), of the mean over them, with the spread over seeds added in
squares. Runs that --out has already, under the same settings, are not run again unless --anew is given.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.methods_page import cells, page, plot, sorted_groups
from benchmarks.methods_subjects import MODULES, SHARE, SPARSITY, STATES, STEPS, Method, Subject, subject_of
from benchmarks.reporting import FIGURES, print_conditions
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.tiny import heldout_path

RESULTS = Path("benchmarks/results")
MODELS = ("tiny", "tiny-mamba2", "tiny-hybrid", *MODULES)
GROUPS = ("states", "parameters", "time", "weights")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12, help="of held-out text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs, one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 windows, three methods of a group")
    parser.add_argument("--anew", action="store_true", help="run again what --out has")
    parser.add_argument("--tables", action="store_true", help="no runs: tables and plot from --out as it is")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.windows = args.seeds[:1], 4
    return args


@dataclass(frozen=True)
class Task:
    """One run of one method, which any process can do."""

    model: str
    group: str
    name: str  # of the method
    seed: int


@functools.cache
def subject(name: str) -> Subject:
    """The dense model and what it is judged on, read once in each process."""
    assert _ARGS is not None
    return subject_of(name, _ARGS)


@functools.cache
def methods(model: str) -> dict[tuple[str, str], Method]:
    """All methods of a model by group and name, in the order of the table."""
    return {(method.group, method.name): method for method in subject(model).methods}


def planned(args: argparse.Namespace) -> list[Task]:
    """What was asked for; with several processes, what takes longest first."""
    tasks = []
    for model in args.models:
        for group in args.groups:
            own = [method for method in methods(model).values() if method.group == group]
            for method in own[: 3 if args.quick else None]:
                seeds = args.seeds[:1] if method.once else args.seeds
                tasks += [(method.once, Task(model, group, method.name, seed)) for seed in seeds]
    if args.jobs > 1:
        tasks.sort(key=lambda item: not item[0])
    return [task for _, task in tasks]


_ARGS: argparse.Namespace | None = None  # of the command line, the same in every process


def begin(args: argparse.Namespace) -> None:
    """What a process does first."""
    global _ARGS
    _ARGS = args
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def carry_out(task: Task) -> dict[str, Any]:
    """What came of one run."""
    method = methods(task.model)[task.group, task.name]
    try:
        return {"seed": task.seed, **subject(task.model).run(method, task.seed)}
    except SsmcError as error:
        return {"seed": task.seed, "refused": str(error)}
    except Exception as error:  # the others' runs are not lost to it
        traceback.print_exc()
        return {"seed": task.seed, "refused": f"failed: {type(error).__name__}: {error}"}


def runs_of(tasks: list[Task], args: argparse.Namespace) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Every run as it ends; several at a time with --jobs."""
    if args.jobs == 1:
        yield from ((task, carry_out(task)) for task in tasks)
        return
    spawn = get_context("spawn")  # a forked process would inherit the threads of numba and torch
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=begin, initargs=(args,)) as pool:
        started = {pool.submit(carry_out, task): task for task in tasks}
        for run in as_completed(started):
            yield started[run], run.result()


def summary(model: str, runs: dict[Task, dict[str, Any]]) -> dict[str, Any]:
    """The rows of a model: what is done so far, in the order of its methods."""
    rows = []
    for (group, name), method in methods(model).items():
        own = [run for task, run in runs.items() if (task.model, task.group, task.name) == (model, group, name)]
        own.sort(key=lambda run: run["seed"])
        refused = [run["refused"] for run in own if "refused" in run]
        if own:
            found = {"refused": refused[0]} if refused else mean_of(own)
            rows.append({**asdict(method), "runs": own, **found})
    return {"dense": subject(model).dense, "planned": [name for _, name in methods(model)], "rows": rows}


def done_before(report: dict[str, Any]) -> dict[Task, dict[str, Any]]:
    """The runs of an earlier report that did not fail."""
    return {
        Task(model, row["group"], row["name"], run["seed"]): run
        for model, found in report["models"].items()
        for row in found["rows"]
        for run in row["runs"]
        if not run.get("refused", "").startswith("failed")
    }


FIGURES_OF_A_RUN = (
    ("excess_nats", "stderr"),
    ("recall_excess_nats", "recall_stderr"),
    ("task", "task_stderr"),
    ("accuracy", None),
)


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds, and its error: that over windows, which all seeds share, and that over seeds, in squares."""
    found: dict[str, Any] = {}
    for figure, error in FIGURES_OF_A_RUN:
        values = [run[figure] for run in runs if run.get(figure) is not None]
        if not values:
            continue
        found[figure] = statistics.mean(values)
        if error is not None:
            over_text = statistics.mean(run[error] or 0.0 for run in runs)
            over_seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            found[error] = math.hypot(over_text, over_seeds) or None
    for figure in ("seconds", "cpu_seconds", "parameters_left"):
        found[figure] = statistics.mean(run[figure] for run in runs)
    return found


def main() -> None:
    args = arguments()
    begin(args)
    if not args.tables:
        measure(args)
    report = json.loads(args.out.read_text(encoding="utf-8"))
    for name, found in report["models"].items():
        print_table(name, found)
    here = args.out.parent == RESULTS  # what is measured elsewhere does not belong into the documentation
    plot(report, FIGURES / f"{args.out.stem}.svg" if here else args.out.with_suffix(".svg"))
    if here:
        (FIGURES.parent / f"{args.out.stem}.md").write_text(page(report), encoding="utf-8")


def measure(args: argparse.Namespace) -> None:
    """Run what is missing. What is done is written whenever a run ends, for those that are cut short."""
    names = ("seeds", "nsamples", "seqlen", "window", "windows", "quick")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"share": SHARE, "steps": STEPS, "states": STATES, "sparsity": SPARSITY}
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "settings": settings, "models": {}}
    runs: dict[Task, dict[str, Any]] = {}
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if earlier.get("settings") == settings:
        runs, report["models"] = done_before(earlier), earlier["models"]
    wanted = [task for task in planned(args) if args.anew or task not in runs]
    for task, run in runs_of(wanted, args):
        runs[task] = run
        told = run["refused"] if "refused" in run else f"{run['excess_nats']:+.4f}"
        print(f"{task.model}: {task.name}, seed {task.seed}: {told}", flush=True)
        report["models"][task.model] = summary(task.model, runs)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_table(name: str, found: dict[str, Any]) -> None:
    """Methods by group, the least loss first."""
    headings = ("", "method", "parameters left", "excess nats", "recall", "task", "right", "CPU seconds")
    table = Table(*headings, title=f"{name}: dense {found['dense']['nats']:.4f} nats, {found['dense']['accuracy']:.1%}")
    for group, rows in sorted_groups(found):
        for i, row in enumerate(rows):
            table.add_row("" if i else group, row["name"], *cells(row))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
