"""From the studies' JSON files to docs/studies/README.md: tables, one-sentence readings and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.studies.models import DENSE, ENTRIES, FORGETFUL, OURS, PAPER, SIZES, WHOLE

matplotlib.use("svg")
import matplotlib.pyplot as plt

from ssmc.runtime.measure.perplexity import mean_and_stderr

FLOOR = 1e-5  # nats: the lowest excess a logarithmic plot shows
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """One study's part of the README."""

    title: str
    asks: str
    tables: Callable[[dict], list[str]]
    reading: Callable[[dict], list[str]]  # sentences, each with its figures
    plot: Callable[[dict, Path], None]


def rebuild(results: Path, folder: Path | None = None) -> Path:
    """Write README.md and the plots into `folder` from all studies whose JSON is in `results`.

    Args:
        results: where the studies' JSON is.
        folder: where the page goes; None takes `results` itself.
    """
    folder, parts = folder or results, [HEAD]
    for name, page in PAGES.items():
        file = results / f"{name}.json"
        if not file.is_file():
            continue
        study = json.loads(file.read_text(encoding="utf-8"))
        with plt.rc_context({"svg.hashsalt": "ssmc"}):
            page.plot(study, folder / f"{name}.svg")
        parts += [f"## {page.title}", page.asks, *page.tables(study)]
        parts += [" ".join(page.reading(study)), f"![{page.title}]({name}.svg)", *_failures(study), _conditions(study)]
    parts += ["## The paper's own numbers", *paper_table()]
    path = folder / "README.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


HEAD = """# Studies

Written by `python -m benchmarks.studies.run [MODEL]`, which makes the tables anew for any Mamba-1 checkpoint; do not
edit. "Excess" is the mean negative log-likelihood above the dense model's, in nats a token, over windows of held-out
text that do not overlap; ± is one standard error over windows, paired. The lowest figure of a column is bold. Scores
are named as on the command line: `sparsessm-vote` is the paper's first version, `sparsessm` (time-weighted) its
second, `sparsessm-l2` its ablation. Where the model has the dimensions of one of the paper's, the paper's figure
stands beside."""


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


# --- studies on a model ---


def grid(study: dict, table: str, key: str = "perplexity") -> str:
    """Rows by columns of one table; the lowest of each column bold, the paper's figure beside."""
    rows = [r for r in study["rows"] if r["table"] == table]
    names, columns = (list(dict.fromkeys(r[k] for r in rows)) for k in ("row", "column"))
    cells = {(r["row"], r["column"]): r for r in rows}
    lowest = {c: min((r[key] for r in rows if r["column"] == c and r.get(key) is not None), default=0) for c in columns}
    lines = []
    for name in names:
        line = [name]
        for column in columns:
            value = cells.get((name, column), {}).get(key)
            text = number(value)
            paper = PAPER.get((study["settings"]["size"], column, name))
            line.append((f"**{text}**" if value == lowest[column] else text) + (f" (paper {paper:g})" if paper else ""))
        lines.append(line)
    return markdown(["", *columns], lines)


def _methods_tables(study: dict) -> list[str]:
    settings = study["settings"]
    paper = PAPER.get((settings["size"], DENSE, DENSE))
    dense = f"Perplexity; the dense model has {number(settings['dense_perplexity'])}"
    return [
        f"{dense}{f' (paper {paper:g})' if paper else ''}. `random` is the mean loss of several draws.",
        "Entries of A_log set to 0, the plain checkpoint: A = -1, the state goes on with decay exp(-dt). Nothing gets "
        "smaller:",
        grid(study, ENTRIES),
        "The same models as the paper's published code evaluates them (model/mamba.py of CFinTech/SparseSSM at "
        "4eb0984): wherever A is -1 it sets the decay to 0, so a pruned entry has no memory at all. A stock runtime "
        "that loads the checkpoint does not. The paper's figures for entries most likely belong here:",
        grid(study, FORGETFUL),
        "Whole states removed, for all channels (this shrinks):",
        grid(study, "columns"),
        f"{WHOLE.capitalize()}, 50 % of A_log (entries, or states) and of every projection and conv1d:",
        grid(study, WHOLE),
        "Mamba-Shedder: whole blocks (`layer`) or their SSM (`ssm-module`) removed, greedily by the calibration text's "
        "perplexity; the part of all layers that goes:",
        grid(study, "shedder"),
    ]


PLACES = (
    (ENTRIES, "unstructured 50 %"),
    (FORGETFUL, "unstructured 50 %"),
    (ENTRIES, "2:4"),
    (FORGETFUL, "2:4"),
    ("columns", "column 50 %"),
)


def _methods_reading(study: dict) -> list[str]:
    sentences = []
    for table, column in PLACES:
        rows = _scored(study, table, column)
        if len(rows) > 1:
            best, worst = rows[0], rows[-1]
            sentences.append(f"{table}, {column}: `{best['row']}` loses least ({_excess(best)}), `{worst['row']}` most")
            sentences[-1] += f" ({_excess(worst)})."
    rows = sorted((r for r in study["rows"] if r["table"] == WHOLE and _is(r)), key=lambda r: r["nll"])
    if rows:
        best = rows[0]
        sentences.append(f"Whole model: least is lost by {best['row']}, {best['column']} ({_excess(best)}).")
    by = {(r["row"], r["column"]): r for r in rows}
    for name in dict.fromkeys(r["row"] for r in rows if "weights: sparsegpt" in r["row"]):
        even, ramp = (next((by[k] for k in by if k[0] == name and k[1].startswith(c)), None) for c in ("uni", "Eq. 7"))
        if even and ramp:
            sentences.append(f"Eq. 7 against uniform, {name}: {_paired(ramp, even)}.")
    return sentences


def _aggregation_reading(study: dict) -> list[str]:
    sentences = []
    for column in dict.fromkeys(r["column"] for r in study["rows"]):
        rows = _scored(study, "aggregation", column)
        if len(rows) > 1:
            best, worst = rows[0], rows[-1]
            sentences.append(f"{column}: best `{best['row']}` ({_excess(best)}), worst `{worst['row']}`")
            sentences[-1] += f" ({_excess(worst)}), {_paired(best, worst)} between the two."
    return sentences


def _samples_reading(study: dict) -> list[str]:
    sentences = []
    for name in dict.fromkeys(r["row"] for r in study["rows"]):
        rows = [r for r in study["rows"] if r["row"] == name and _is(r)]
        if len(rows) > 1:
            first, last = rows[0], rows[-1]
            sentences.append(
                f"`{name}`: {last['column']} samples instead of {first['column']}: {_paired(last, first)}."
            )
    return sentences


def _alpha_reading(study: dict) -> list[str]:
    sentences = []
    for name in dict.fromkeys(r["row"] for r in study["rows"]):
        rows = [r for r in study["rows"] if r["row"] == name and _is(r)]
        if len(rows) > 1:
            best = min(rows, key=lambda r: r["nll"])
            sentences.append(f"{name}: the lowest perplexity is at alpha {best['column']}")
            sentences[-1] += f", {_paired(best, rows[0])} against uniform." if best is not rows[0] else ", uniform."
    return sentences


def _is(row: dict) -> bool:
    return row.get("nll") is not None


def _scored(study: dict, table: str, column: str) -> Rows:
    rows = (r for r in study["rows"] if r["table"] == table and r["column"] == column and _is(r))
    return sorted(rows, key=lambda r: r["nll"])


def _excess(row: dict) -> str:
    stderr = f" ± {row['excess_stderr']:.4f}" if row["excess_stderr"] is not None else ""
    return f"{row['excess_nats']:+.4f}{stderr} nats"


def _paired(row: dict, other: dict) -> str:
    """Difference of two rows on the same windows."""
    if not (row["window_nll"] and other["window_nll"]):
        return f"{row['nll'] - other['nll']:+.4f} nats"
    mean, stderr = mean_and_stderr([a - b for a, b in zip(row["window_nll"], other["window_nll"], strict=True)])
    return f"{mean:+.4f}{f' ± {stderr:.4f}' if stderr is not None else ''} nats"


def _plot_methods(study: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    places = ((ENTRIES, "unstructured "), (FORGETFUL, "unstructured "), ("columns", "column "))
    for axes, (table, pattern) in zip(panels, places, strict=True):
        rows = [r for r in study["rows"] if r["table"] == table and r["column"].startswith(pattern) and _is(r)]
        for i, name in enumerate(dict.fromkeys(r["row"] for r in rows)):
            mine = [r for r in rows if r["row"] == name]
            x = [float(r["column"].removeprefix(pattern).removesuffix(" %")) for r in mine]
            axes.plot(x, [max(r["excess_nats"], FLOOR) for r in mine], color=f"C{i}", marker=MARKERS[i], label=name)
        axes.set(yscale="log", xlabel="% removed", title=table)
        if rows:
            axes.legend(fontsize=7)
    panels[0].set_ylabel("excess loss (nats a token)")
    _save(figure, path)


def _plot_aggregation(study: dict, path: Path) -> None:
    columns = list(dict.fromkeys(r["column"] for r in study["rows"]))
    figure, panels = plt.subplots(1, len(columns), figsize=(10, 3.2), sharey=True, squeeze=False)
    for axes, column in zip(panels[0], columns, strict=True):
        rows = [r for r in study["rows"] if r["column"] == column and _is(r)]
        axes.barh([r["row"] for r in rows], [r["excess_nats"] for r in rows], xerr=[_error(r) for r in rows])
        axes.set(xlabel="excess loss (nats a token)", title=column)
    panels[0][0].invert_yaxis()
    _save(figure, path)


def _plot_lines(study: dict, path: Path, x_label: str, **axes_options: Any) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for i, name in enumerate(dict.fromkeys(r["row"] for r in study["rows"])):
        rows = [r for r in study["rows"] if r["row"] == name and _is(r)]
        x, y = [float(r["column"]) for r in rows], [max(r["excess_nats"], FLOOR) for r in rows]
        axes.errorbar(x, y, [_error(r) for r in rows], marker=MARKERS[i], capsize=2, label=name)
    axes.set(xlabel=x_label, ylabel="excess loss (nats a token)", **axes_options)
    axes.legend()
    _save(figure, path)


def _error(row: dict) -> float:
    return row["excess_stderr"] or 0.0


# --- constructed layers ---


def _median(rows: Rows, key: str) -> float:
    return statistics.median(r[key] for r in rows)


def _pick(study: dict, **wanted: Any) -> Rows:
    return [r for r in study["rows"] if all(r[k] == v for k, v in wanted.items())]


def _values(study: dict, key: str) -> list:
    return list(dict.fromkeys(r[key] for r in study["rows"]))


def _uniformity_tables(study: dict) -> list[str]:
    tables, knobs = [], _values(study, "knob")
    similarity = [f"{_median(_pick(study, knob=k), 'correlation'):.2f}" for k in knobs]
    for repair in (False, True):
        best = [f"{_median(_pick(study, knob=k, repair=repair), 'best_error'):.2g}" for k in knobs]
        lines = [["mean correlation of two states", *similarity], ["relative error of the best set", *best]]
        for score in _values(study, "score"):
            groups = [_pick(study, knob=k, repair=repair, score=score) for k in knobs]
            lines.append([score, *(f"{_median(g, 'ratio'):.2f} ({max(r['ratio'] for r in g):.2f})" for g in groups)])
        tables += [f"{'With' if repair else 'Without'} repair:", markdown(["knob", *(f"{k:g}" for k in knobs)], lines)]
    return tables


def _uniformity_reading(study: dict) -> list[str]:
    sentences, knobs = [], _values(study, "knob")
    for repair in (False, True):
        parts = []
        for score in ("energy", "sparsessm-l2", "exact"):
            ratios = [_median(_pick(study, knob=k, repair=repair, score=score), "ratio") for k in knobs]
            parts.append(f"`{score}` {ratios[0]:.2f} times at knob {knobs[0]:g}, at worst {max(ratios):.2f} times")
        sentences.append(f"{'With' if repair else 'Without'} repair, of the best set's error: {'; '.join(parts)}.")
    return sentences


def _plot_uniformity(study: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, repair in zip(panels, (False, True), strict=True):
        for i, score in enumerate(_values(study, "score")):
            y = [_median(_pick(study, knob=k, repair=repair, score=score), "ratio") for k in _values(study, "knob")]
            axes.plot(_values(study, "knob"), y, color=f"C{i}", marker=MARKERS[i], label=score)
        axes.set(xlabel="0: independent states, 1: copies", title=f"{'with' if repair else 'without'} repair")
    panels[0].set_ylabel("error / error of the best set (median)")
    panels[1].legend(fontsize=8)
    _save(figure, path)


def _rare_tables(study: dict) -> list[str]:
    tables, rates = [], _values(study, "rate")
    for kind in _values(study, "kind"):
        alone = [f"{_median(_pick(study, kind=kind, rate=r), 'alone'):.2f}" for r in rates]
        lines = [["*relative error if it alone goes*", *alone]]
        for score in _values(study, "score"):
            groups = [_pick(study, kind=kind, rate=r, score=score) for r in rates]
            cells = [f"{_median(g, 'rank'):g} ({_lost(g, study)} of {len(g)} lost)" for g in groups]
            lines.append([score, *cells])
        title = f"A state that is {kind}: median rank, and in how many layers it is among the half that goes:"
        tables += [title, markdown(["part of the steps", *(f"{100 * r:g} %" for r in rates)], lines)]
    return tables


def _lost(rows: Rows, study: dict) -> int:
    return sum(study["settings"]["rare_state"] not in r["kept"] for r in rows)


def _rare_reading(study: dict) -> list[str]:
    sentences, rate = [], _values(study, "rate")[0]
    for kind in _values(study, "kind"):
        groups = {score: _pick(study, kind=kind, rate=rate, score=score) for score in _values(study, "score")}
        keep = [f"`{s}`" for s, rows in groups.items() if _lost(rows, study) == 0]
        lose = [f"`{s}`" for s, rows in groups.items() if _lost(rows, study) == len(rows)]
        sentences.append(f"{kind.capitalize()} ({100 * rate:g} % of the steps): always kept by {_list(keep)};")
        sentences[-1] += f" always lost by {_list(lose)}."
    return sentences


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _plot_rare(study: dict, path: Path) -> None:
    kinds, rates = _values(study, "kind"), _values(study, "rate")
    figure, panels = plt.subplots(1, len(kinds), figsize=(12, 4.2), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for i, score in enumerate(_values(study, "score")):
            rows = [_pick(study, kind=kind, rate=r, score=score) for r in rates]
            ranks = [statistics.mean(r["rank"] for r in group) for group in rows]
            axes.plot([100 * r for r in rates], ranks, color=f"C{i}", marker=MARKERS[i], label=score)
        axes.set(xscale="log", xlabel="% of the steps", title=kind)
    panels[0][0].set_ylabel("mean rank of the state (1: the dearest)")
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize=7)
    _save(figure, path)


# --- all ---

MARKERS = "osv^DPX*<>"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _failures(study: dict) -> list[str]:
    failed = [r for r in study["rows"] if r.get("failed")]
    return ["\n".join(f"- No figure for {r['row']}, {r['column']}: {r['failed']}" for r in failed)] if failed else []


def _conditions(study: dict) -> str:
    c, settings = study["conditions"], study["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    told = ", ".join(f"{k} {_plain(v)}" for k, v in settings.items() if v is not None and k != "dense_window_nll")
    machine = f"{c['cpu']}, {c['torch_threads']} threads, {c['device']}, Python {c['python']}, {versions}"
    took = f"{study['seconds']:.0f} s, {c['date'][:10]}"
    return f"`{study['command']}`\n({told}; {machine}; {took})"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v:.12}" if k == "sha256" else f"{k} {_plain(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def paper_table() -> list[str]:
    """Everything the paper reports that a table above has a place for."""
    models = [*SIZES.values(), "Mamba2-370M"]
    places = dict.fromkeys((table, row) for _, table, row in PAPER)
    lines = []
    for table, row in places:
        figures = (PAPER.get((model, table, row)) for model in models)
        lines.append([table if row == DENSE else f"{table}, {row}", *("" if f is None else f"{f:g}" for f in figures)])
    return [
        "Perplexity on WikiText-2 (SparseSSM, arXiv 2506.09613). To compare: `python -m benchmarks.studies.run "
        "state-spaces/mamba-370m-hf --calib wikitext2 --text wikitext2 --nsamples 64 --seqlen 2048 --window 2048 "
        f"--windows 0`. `{OURS}` belongs beside the rows `sparsessm-vote` and `sparsessm`.",
        markdown(["", *models], lines),
    ]


PAGES = {
    "methods": Page(
        "Methods, patterns, sparsities",
        "What each way to prune costs.",
        _methods_tables,
        _methods_reading,
        _plot_methods,
    ),
    "aggregation": Page(
        "Aggregation over time",
        "SparseSSM's importance of an entry at each time step, brought to one number by votes, by a weighted sum, or "
        "by a plain one; without repair. Perplexity:",
        lambda study: [grid(study, "aggregation")],
        _aggregation_reading,
        _plot_aggregation,
    ),
    "samples": Page(
        "Number of calibration samples",
        "Column pruning at 50 %. Perplexity by number of samples:",
        lambda study: [grid(study, "samples")],
        _samples_reading,
        lambda study, path: _plot_lines(study, path, "calibration samples", xscale="log", yscale="log"),
    ),
    "alpha": Page(
        "Sensitivity-aware sparsity (Eq. 7)",
        "How far the sparsities of in_proj and out_proj spread over the layers around 50 %; weights by SparseGPT, "
        "A_log (whole model) by `sparsessm`. Perplexity by alpha:",
        lambda study: [grid(study, "alpha")],
        _alpha_reading,
        lambda study, path: _plot_lines(study, path, "alpha"),
    ),
    "uniformity": Page(
        "Where the diagonal approximation fails",
        "Constructed layers whose states are the more alike the further the knob is turned: rows of B and columns of A "
        "are interpolated towards common ones. Half of the states go. Figures: true error of the gated output, divided "
        "by that of the best of all subsets, median over layers (largest in brackets). A diagonal score adds up what "
        "each state loses alone; states that are alike cancel each other or add up.",
        _uniformity_tables,
        _uniformity_reading,
        _plot_uniformity,
    ),
    "rare": Page(
        "A state that matters at rare steps",
        "Constructed layers with one state that is written (B), read (C), or both at a small part of the steps only, "
        "so strongly that its output energy is the same at every rate, several times that of any other. Rank 1 is the "
        "state a score lets go last. The vote adds up samples before it votes, so it is given for several numbers of "
        "samples.",
        _rare_tables,
        _rare_reading,
        _plot_rare,
    ),
}
