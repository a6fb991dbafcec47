"""What `benchmarks.speed.consumers` found, as tables for the terminal and the documentation, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DENSE = "dense"
PHASES = ("prefill", "decode")
Record = dict[str, Any]
"""One model in one runtime: see `measure`."""


def read_records(path: Path | None) -> list[Record]:
    """Those of earlier runs; none where there is no file."""
    if path is None or not path.is_file():
        return []
    return json.loads(path.read_text(encoding="utf-8")).get("records", [])


def merged(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Old records with those in them replaced that were measured again, new ones behind."""
    records = {(record["model"], record["runtime"]): record for record in old}
    return list((records | {(record["model"], record["runtime"]): record for record in new}).values())


def show(records: Sequence[Record]) -> None:
    """The table, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "runtime", "kept", "prefill ms", "x dense", "decode ms", "x dense", "loss, nats")
    for record in records:
        for row in record["rows"]:
            cells = []
            for phase in PHASES:
                low, high = (1e3 * q for q in row[phase]["quartiles_s"])
                ratio = row[phase].get("times_faster_than_dense")
                cells.append(f"{1e3 * row[phase]['median_s']:.2f} ({low:.2f} .. {high:.2f})")
                cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})" if ratio else "")
            table.add_row(record["model"], record["runtime"], row["kept"], *cells, f"{row['loss']['nats']:+.4f}")
    Console(width=180).print(table)
    for record in records:
        for kept, reason in record["missing"].items():
            print(f"{record['model']}, {record['runtime']}, {kept}: {reason}")


def markdown(records: Sequence[Record]) -> str:
    """A row for each model, a column for each runtime: milliseconds of the dense one, of others the gain."""
    runtimes = list(dict.fromkeys(record["runtime"] for record in records))
    found = {(r["model"], r["runtime"], row["kept"]): row for r in records for row in r["rows"]}
    lines = []
    for model, kept in dict.fromkeys((model, kept) for model, _, kept in found):
        rows = [found.get((model, runtime, kept)) for runtime in runtimes]
        losses = sorted({f"{row['loss']['nats']:+.4f}" for row in rows if row is not None})
        loss = "" if kept == DENSE else losses[0] if len(losses) == 1 else f"{losses[0]} to {losses[-1]}"
        lines.append((model, kept, *(_cell(row) for row in rows), loss))
    headings = ("model", "removed", *runtimes, "loss")
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *lines))


def _cell(row: Record | None) -> str:
    """Prefill and decode: milliseconds of the dense model, of others the gain, in brackets where it may be 1."""
    if row is None:
        return ""
    if row["kept"] == DENSE:
        return " / ".join(f"{1e3 * row[phase]['median_s']:.3g} ms" for phase in PHASES)
    ratios = [row[phase]["times_faster_than_dense"] for phase in PHASES]
    return " / ".join(
        f"{r['median']:.2f}" if not r["low"] <= 1 <= r["high"] else f"({r['median']:.2f})" for r in ratios
    )


def plot(records: Sequence[Record], path: Path) -> None:
    """Bars: how many times as fast as the dense model, by runtime and phase, a column for each model."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "consumers"
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = plt.subplots(
        2,
        len(models),
        figsize=(5 * len(models) + 1, 6),
        sharey="row",
        sharex="col",
        layout="constrained",
        squeeze=False,
    )
    for column, model in enumerate(models):
        own = [record for record in records if record["model"] == model and record["rows"]]
        for line, phase in enumerate(PHASES):
            _bars(axes[line][column], own, phase)
        axes[0][column].set_title(model)
        axes[0][column].legend(fontsize="x-small", ncols=2)
        axes[1][column].set_xticks(range(len(own)), [record["runtime"] for record in own], rotation=30, ha="right")
    for line, phase in enumerate(PHASES):
        axes[line][0].set_ylabel(f"{phase}, times as fast as dense")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bars(axis: Any, records: Sequence[Record], phase: str) -> None:
    """The pruned models of one model in every runtime, with the interval of the median."""
    kept = list(dict.fromkeys(row["kept"] for record in records for row in record["rows"] if row["kept"] != DENSE))
    width = 0.8 / max(1, len(kept))
    for number, cut in enumerate(kept):
        ratios = {
            place: row[phase]["times_faster_than_dense"]
            for place, record in enumerate(records)
            for row in record["rows"]
            if row["kept"] == cut
        }
        places = [place + width * number - 0.4 for place in ratios]
        heights = [ratio["median"] for ratio in ratios.values()]
        lows = [max(0.0, ratio["median"] - ratio["low"]) for ratio in ratios.values()]
        highs = [ratio["high"] - ratio["median"] for ratio in ratios.values()]
        axis.bar(places, heights, width, label=cut, yerr=[lows, highs], align="edge", error_kw={"linewidth": 0.8})
    axis.axhline(1, color="black", linewidth=0.8)
