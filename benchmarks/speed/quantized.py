"""Pruned, quantised, both, and with states in int8: size, speed, memory of a sequence, perplexity, tasks, side by side.

    python -m benchmarks.speed.quantized                 # tiny-mamba2
    python -m benchmarks.speed.quantized tiny --time-budget 60
    python -m benchmarks.speed.quantized MODEL --tasks lambada_openai,piqa --limit 200 --data DATA

Every model is an ONNX graph that onnxruntime runs on the CPU; the first is the dense one in float32. The models are
timed in turns by `ssmc.benchmark`. "Pruned" has a quarter of the states, repaired; "int8" is onnxruntime's own dynamic
quantisation; "w4" are the codes of `ssmc compress --quantize w4 --quantize-embedding w8`, activations in int8.
Graphs with int8 states are scored token by token, so that states are rounded after every one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssmc import benchmark, compress, export
from ssmc.runtime.bench import summary_rows
from ssmc.runtime.errors import VerificationError
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.files import finite

PRUNED = {"pattern": "column", "sparsity": 0.75}
CODES = {"quantize": "w4", "quantize_embedding": "w8"}
ARTEFACTS: dict[str, dict[str, Any]] = {
    "pruned": PRUNED,
    "w4": CODES,
    "pruned-w4": PRUNED | CODES,
}
"""Name -> options of `compress`."""
GRAPHS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "dense, int8": (None, {"quantize": "int8"}),
    "dense, w4": ("w4", {"quantize": "codes", "activations": "int8"}),
    "dense, int8 states": (None, {"state_dtype": "int8"}),
    "pruned": ("pruned", {}),
    "pruned, int8": ("pruned", {"quantize": "int8"}),
    "pruned, w4": ("pruned-w4", {"quantize": "codes", "activations": "int8"}),
    "pruned, w4, int8 states": ("pruned-w4", {"quantize": "codes", "activations": "int8", "state_dtype": "int8"}),
}
"""Name -> the artefact that is exported, None for the model itself, and the options of its export."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-mamba2")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--time-budget", type=float, default=90.0, help="seconds of timing")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--batch", type=int, default=8, help="the larger of the batches, beside 1")
    parser.add_argument("--max-windows", type=int, default=8, help="windows of 1024 tokens of held-out text")
    parser.add_argument("--tasks", default="", help="of lm-eval, none by default")
    parser.add_argument("--limit", type=int, help="documents of each task; all by default")
    parser.add_argument("--data", type=Path, help="folder with the documents of the tasks")
    parser.add_argument("--work", type=Path, help="folder for the graphs, which stay there and are used again")
    parser.add_argument("--only-graphs", action="store_true", help="write them and time nothing")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/quantized_MODEL.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    name = Path(args.model).name.replace("-", "_")
    with tempfile.TemporaryDirectory() as scratch:
        folders, refused = graphs(args, args.work or Path(scratch))
        if args.only_graphs:
            return
        report = benchmark(
            models=list(folders.values()),
            lengths=(args.length,),
            batch_sizes=(1, args.batch),
            time_budget=args.time_budget,
            max_windows=args.max_windows,
            stock=False,
            device="cpu",
        )
        scores = accuracies(args, folders) if args.tasks else {}
    show(report, list(folders), scores)
    out = args.out or Path(f"benchmarks/results/quantized_{name}.json")
    settings = {"artefacts": ARTEFACTS, "nsamples": args.nsamples, "graphs": list(GRAPHS), "limit": args.limit}
    settings["refused"] = refused
    found = {"model": name, **settings, "tasks": scores, **report.to_json()}
    out.write_text(json.dumps(finite(found), indent=1) + "\n")


def graphs(args: argparse.Namespace, work: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of all graphs, those that are missing made now, and why export refused the others."""
    work.mkdir(parents=True, exist_ok=True)
    for name, options in ARTEFACTS.items():
        if not (work / name).exists():
            compress(args.model, out=work / name, nsamples=args.nsamples, **options)
    folders, refused = {}, {}
    for name, (artefact, options) in GRAPHS.items():
        folder = work / "graphs" / name.replace(", ", "-").replace(" ", "-")
        try:
            if not folder.exists():
                export(args.model if artefact is None else work / artefact, format="onnx", out=folder, **options)
                print(f"exported {name}", flush=True)
            folders[name] = folder
        except VerificationError as error:
            refused[name] = str(error)
            print(f"{name}: {error}", flush=True)
    return folders, refused


def accuracies(args: argparse.Namespace, folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy on each task: of every graph, with its standard error and its paired difference to the first."""
    report = evaluate_models(
        list(folders.values()), args.tasks, limit=args.limit, data=args.data, perplexity=False, device="cpu"
    )
    rows = [row for row in report.rows() if row[0].metric == "acc"]
    return {row[0].task: [asdict(score) for score in row] for row in rows}


def show(report: Any, names: list[str], scores: dict[str, list[dict[str, Any]]]) -> None:
    """Print the figures, a column for every model."""
    table = Table(title="ONNX graphs in onnxruntime, CPU")
    for heading in ("", *names):
        table.add_column(heading, justify="right" if heading else "left")
    for row in summary_rows(report):
        changes = ("", *(f"\n{change}" if change else "" for change in row.changes))
        table.add_row(row.metric, *(value.partition(" (")[0] + c for value, c in zip(row.values, changes, strict=True)))
    for task, row in scores.items():
        found = [(score, score["difference"] or {}) for score in row]
        values = [f"{s['value']:.1%}" + (f"\n{d['value']:+.1%} ± {d['stderr']:.1%}" if d else "") for s, d in found]
        table.add_row(task, *values)
    Console(width=200).print(table)
    for note in report.notes:
        print(f"Note: {note}")


if __name__ == "__main__":
    main()
