"""Every method of this project side by side, at equal parameters and at equal time: loss, recall, accuracy, seconds.

    python -m benchmarks.methods            # tiny, tiny-mamba2 and a torch module
    python -m benchmarks.methods --quick    # fewer methods, one seed, less text
    python -m benchmarks.methods --models tiny --groups states parameters
    python -m benchmarks.methods --jobs 16  # processes of one thread each

Groups of a table remove the same: as many states; as many parameters (channels or heads, layers, and what the search
takes of everything), to the next channel, head or layer; as much of the time of a prefill; or as many single weights,
which makes nothing smaller. "Excess" is the mean negative log-likelihood above the dense model's, in nats a token, on
held-out text; "recall" the same on tokens seen more than 100 tokens back. Errors are standard errors over windows of
text, paired; where there are several seeds (of the calibration samples), of the mean over them, with the spread over
seeds added in squares.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.loss.digits import Split, judged, train
from benchmarks.methods_page import cells, page, plot, sorted_groups
from benchmarks.reporting import FIGURES, print_conditions
from ssmc import compress
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, LAYER, UNSTRUCTURED, WEIGHTS, scores_of
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure.losses import IGNORED, token_losses
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind, of_kind
from ssmc.runtime.models.checkpoints import load_checkpoint, parameter_counter
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

RESULTS = Path("benchmarks/results")
MODELS = ("tiny", "tiny-mamba2", "module")
GROUPS = ("states", "parameters", "time", "weights")
SHARE = 0.85  # of the parameters, and of the time, that is left where they are equal
STEPS = 60  # of refinement and of distillation
STATES = 0.75
SPARSITY = 0.5  # of single weights


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="of held-out text")
    parser.add_argument("--text", default=heldout_path(), help="held-out text")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs, one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 windows, three methods of a group")
    parser.add_argument("--tables", action="store_true", help="no runs: tables and plot from --out as it is")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.windows = args.seeds[:1], 4
    return args


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    group: str
    name: str
    options: dict[str, Any]
    once: bool = False  # one seed suffices: it takes long, or has no calibration to vary


def methods(equal: dict[str, dict[str, Any]] | None) -> Iterator[Method]:
    """What is compared on a model; what a family refuses is left out when it says so.

    Args:
        equal: by pattern, options that leave SHARE of the parameters; None: of a torch module, which loses states only.
    """
    states = {"pattern": COLUMN, "sparsity": STATES}
    yield Method("states", "exact + repair", states)
    yield Method("states", "ghost", states | {"score": "ghost", "repair": False})
    yield Method("states", "ghost + repair", states | {"score": "ghost"})
    for score in scores_of(COLUMN):
        if score not in ("exact", "ghost"):
            yield Method("states", score, states | {"score": score, "repair": False})
    yield Method("states", "exact", states | {"score": "exact", "repair": False})
    yield Method("states", "exact + repair, no weight on recall", states | {"recall_weight": 0.0})
    yield Method("states", f"exact + repair + refine {STEPS}", states | {"refine": STEPS}, once=True)
    if equal is None:
        return
    yield Method("states", f"exact + repair + distill {STEPS}", states | {"distill": STEPS}, once=True)
    for pattern, options in equal.items():
        for score in scores_of(pattern):
            yield Method("parameters", f"{pattern}, {score}", options | {"pattern": pattern, "score": score})
    channels = equal[CHANNEL] | {"pattern": CHANNEL}
    yield Method("parameters", f"{CHANNEL}, no repair", channels | {"repair": False})
    yield Method("parameters", f"{CHANNEL} + refine {STEPS}", channels | {"refine": STEPS}, once=True)
    yield Method("parameters", f"{CHANNEL} + distill {STEPS}", channels | {"distill": STEPS}, once=True)
    yield Method("parameters", "searched", {"target_params": SHARE}, once=True)
    timed = {"target_latency": SHARE, "length": 512}
    for pattern in (CHANNEL, LAYER, f"{COLUMN}+{CHANNEL}"):
        yield Method("time", pattern, timed | {"pattern": pattern}, once=True)
    yield Method("time", "searched", timed, once=True)
    for score in scores_of(UNSTRUCTURED):
        options = {"pattern": UNSTRUCTURED, "sparsity": SPARSITY, "score": score}
        yield Method("weights", f"A_log, {score}", options)
    for score in scores_of(WEIGHTS):
        yield Method("weights", f"2:4, {score}", {"pattern": "2:4", "ffn_score": score})


class TextModel:
    """A language model and the text it is judged on."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        dense = load_checkpoint(name, dtype=torch.float32)
        tokens = tokenize(read_texts(args.text), load_tokenizer(dense))[: args.windows * args.window]
        self.windows = tokens[: len(tokens) // args.window * args.window].view(-1, args.window)
        self.kinds, self.sizes = kinds_of(self.windows), dense.dimensions
        self._count = parameter_counter(dense.config)
        self.whole = self._count(self.sizes.n_layer, self.sizes.d_inner, self.sizes.d_state)
        self.losses, right = self._scored(dense.model)
        self.dense = {"nats": float(self.losses.mean()), "accuracy": float(right.double().mean())}

    @property
    def methods(self) -> Iterator[Method]:
        """What is compared."""
        sizes = self.sizes
        step = 16 if sizes.heads is None else sizes.d_inner // sizes.heads * sizes.groups
        widths = [w for w in range(step, sizes.d_inner, step) if self._share(sizes.n_layer, w) <= SHARE]
        layers = [n for n in range(1, sizes.n_layer) if self._share(n, sizes.d_inner) <= SHARE]
        equal = {CHANNEL: {"widths": (max(widths, default=step),) * sizes.n_layer}}
        equal[LAYER] = {"sparsity": 1 - max(layers, default=1) / sizes.n_layer}
        return methods(equal)

    def _share(self, n_layer: int, d_inner: int) -> float:
        """Of the parameters; infinite for sizes that transformers does not load."""
        try:
            return self._count(n_layer, d_inner, self.sizes.d_state) / self.whole
        except ValueError:
            return math.inf

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """Compress once and judge."""
        options = {"nsamples": self.args.nsamples, "seqlen": self.args.seqlen, "seed": seed, **method.options}
        with TemporaryDirectory() as folder:
            start, busy = time.perf_counter(), time.process_time()
            result = compress(self.name, out=Path(folder) / "out", **options)
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
            losses, right = self._scored(load_checkpoint(result.directory, dtype=torch.float32).model)
        by_kind = loss_by_kind(losses.numpy(), self.kinds, self.losses.numpy())
        far, every = of_kind(by_kind, "far"), of_kind(by_kind, "all")
        assert every is not None
        found = {"excess_nats": every.excess, "stderr": every.excess_stderr, "accuracy": float(right.double().mean())}
        if far is not None:
            found |= {"recall_excess_nats": far.excess, "recall_stderr": far.excess_stderr}
        keep, gone = result.plan.keep, len({removal.layer for removal in result.removals})
        sizes = (self.sizes.n_layer - gone, max(keep.channels), max(keep.states))
        return found | spent | {"parameters_left": self._count(*sizes) / self.whole, "sizes": sizes}

    def _scored(self, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and whether the likeliest token was right, (W, L - 1) each."""
        targets = torch.nn.functional.pad(self.windows[:, 1:], (0, 1), value=IGNORED)
        model, rows = use_fast_scan(model), zip(self.windows.split(1), targets.split(1), strict=True)
        losses, right = zip(*(token_losses(model, *row) for row in rows), strict=True)
        return torch.cat(losses)[:, :-1], torch.cat(right)[:, :-1]


class DigitsModule:
    """A torch module that is no language model: `benchmarks.loss.digits`. It has no recall to lose."""

    def __init__(self, args: argparse.Namespace):
        self.split = Split.drawn(0)
        self.model = train(self.split, 0, 4 if args.quick else 8)
        self.dense, self.methods = judged(self.model, self.split), list(methods(None))

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """Compress once and judge."""
        start, busy = time.perf_counter(), time.process_time()
        result = compress(self.model, self.split.calibration(), seed=seed, **method.options)
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
        got, images = judged(result.module, self.split), len(self.split.unseen)
        error = math.sqrt(got["accuracy"] * (1 - got["accuracy"]) / images)
        left = sum(p.numel() for p in result.module.parameters()) / sum(p.numel() for p in self.model.parameters())
        found = {"excess_nats": got["nats"] - self.dense["nats"], "stderr": None, "accuracy": got["accuracy"]}
        return found | spent | {"accuracy_stderr": error, "parameters_left": left}


Subject = TextModel | DigitsModule


@dataclass(frozen=True)
class Task:
    """One run of one method, which any process can do."""

    model: str
    place: int  # of the method in `chosen`
    seed: int


@functools.cache
def subject(name: str) -> Subject:
    """The dense model and what it is judged on, read once in each process."""
    assert _ARGS is not None
    return DigitsModule(_ARGS) if name == "module" else TextModel(name, _ARGS)


@functools.cache
def chosen(name: str) -> tuple[Method, ...]:
    """The methods that were asked for, in the order of the table."""
    assert _ARGS is not None
    every = list(subject(name).methods)
    groups = [[method for method in every if method.group == group] for group in _ARGS.groups]
    return tuple(method for group in groups for method in group[: 3 if _ARGS.quick else None])


_ARGS: argparse.Namespace | None = None  # of the command line, the same in every process


def begin(args: argparse.Namespace) -> None:
    """What a process does first."""
    global _ARGS
    _ARGS = args
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def carry_out(task: Task) -> dict[str, Any]:
    """What came of one run."""
    method = chosen(task.model)[task.place]
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


def summary(name: str, runs: dict[Task, dict[str, Any]]) -> dict[str, Any]:
    """The rows of a model: what is done so far, in the order of its methods."""
    rows = []
    for place, method in enumerate(chosen(name)):
        own = [
            run
            for task, run in sorted(runs.items(), key=lambda item: item[0].seed)
            if (task.model, task.place) == (name, place)
        ]
        refused = [run["refused"] for run in own if "refused" in run]
        if refused:
            rows.append({**asdict(method), "refused": refused[0]})
        elif own:
            rows.append({**asdict(method), "runs": own, **mean_of(own)})
    return {"dense": subject(name).dense, "planned": [method.name for method in chosen(name)], "rows": rows}


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds, and its error: that over windows, which all seeds share, and that over seeds, in squares."""
    found: dict[str, Any] = {}
    for figure, error in (("excess_nats", "stderr"), ("recall_excess_nats", "recall_stderr"), ("accuracy", None)):
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
    """Run everything. What is done is written whenever a run ends, for those that are cut short."""
    names = ("seeds", "nsamples", "seqlen", "window", "windows", "quick", "groups")
    settings = {name: getattr(args, name) for name in names} | {
        "share": SHARE,
        "steps": STEPS,
        "states": STATES,
        "sparsity": SPARSITY,
    }
    report: dict[str, Any] = {"conditions": asdict(print_conditions()), "settings": settings, "models": {}}
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if earlier.get("settings") == settings:  # of other models
        report["models"] = {name: found for name, found in earlier["models"].items() if name not in args.models}
    tasks = [
        (method.once, Task(name, place, seed))
        for name in args.models
        for place, method in enumerate(chosen(name))
        for seed in (args.seeds[:1] if method.once else args.seeds)
    ]
    if args.jobs > 1:
        tasks.sort(key=lambda item: not item[0])  # those that take longest first
    runs: dict[Task, dict[str, Any]] = {}
    for task, run in runs_of([task for _, task in tasks], args):
        runs[task] = run
        told = run["refused"] if "refused" in run else f"{run['excess_nats']:+.4f}"
        print(f"{task.model}: {chosen(task.model)[task.place].name}, seed {task.seed}: {told}", flush=True)
        report["models"][task.model] = summary(task.model, runs)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_table(name: str, found: dict[str, Any]) -> None:
    """Methods by group, the least loss first."""
    headings = ("", "method", "parameters left", "excess nats", "recall", "accuracy", "CPU seconds")
    table = Table(*headings, title=f"{name}: dense {found['dense']['nats']:.4f} nats, {found['dense']['accuracy']:.1%}")
    for group, rows in sorted_groups(found):
        for i, row in enumerate(rows):
            table.add_row("" if i else group, row["name"], *cells(row))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
