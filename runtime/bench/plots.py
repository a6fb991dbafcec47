"""The plots of the page, as SVG to be put into HTML: they take the page's colours, light or dark, and load nothing."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from ssmc.runtime.bench.results import Measurement, Results
from ssmc.runtime.bench.tradeoff import trade_offs

# Matplotlib writes plain colours; these stand for the page's CSS variables and are replaced by them in the SVG.
INK, GRID, PAPER = "#010101", "#020202", "#020203"
SERIES = tuple(f"#0304{number:02x}" for number in range(6))
_CSS = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--card)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, searchable, in the page's font
    "text.parse_math": False,  # a model's name may have a dollar sign
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def plots(report: Results) -> dict[str, str]:
    """All plots there is data for: name -> SVG element."""
    drawings: dict[str, tuple[Callable[[Axes, Results], None], str]] = {
        "prefill": (_prefill, "Prefill time over length, one line for every model"),
        "decode": (_decode, "Time of a decoding step over batch size, one bar for every model"),
        "speedup": (_speedup, "Speed-up of the scan alone beside the speed-up of the whole prefill"),
        "sizes": (_sizes, "Sizes of the compressed models in per cent of the dense one"),
    }
    drawn = {}
    if len(report.compressed) > 1 and trade_offs(report):
        drawn["tradeoff"] = _svg("tradeoff", _trade_off, "Loss over time, one point for every model", report)
    for name, (draw, description) in drawings.items():
        drawable = {"speedup": _has_scans(report)}.get(name, len(report.models) > 1 or name != "sizes")
        if drawable:
            drawn[name] = _svg(name, draw, description, report)
    return drawn


def _prefill(axes: Axes, report: Results) -> None:
    measured = _smallest_batch(report.of_kind("prefill"))
    lengths = [m.length for m in measured]
    for model, color in zip(report.models, SERIES, strict=False):
        if any(model.name not in m.timings for m in measured):
            continue
        timings = [m.timings[model.name] for m in measured]
        middle = [t.median * 1e3 for t in timings]
        spread = [[abs(t.quartiles[side] - t.median) * 1e3 for t in timings] for side in (0, 1)]
        axes.errorbar(lengths, middle, yerr=spread, color=color, marker="o", lw=2, capsize=4, label=model.name)
    axes.set(xscale="log", yscale="log", title="Prefill, ms", xlabel=f"tokens, batch {measured[0].batch}")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(length) for length in lengths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _decode(axes: Axes, report: Results) -> None:
    measured = report.of_kind("decode")
    groups = [f"batch {m.batch}" for m in measured]
    series = {model.name: [m.timings.get(model.name) for m in measured] for model in report.models}
    # a bar of no height where a model does not take so many sequences at once
    bars = {name: [t.median * 1e3 if t else 0.0 for t in timings] for name, timings in series.items()}
    spread = {
        name: [[abs(t.quartiles[side] - t.median) * 1e3 if t else 0.0 for t in timings] for side in (0, 1)]
        for name, timings in series.items()
    }
    _bars(axes, groups, bars, SERIES, spread)
    axes.set(title="Decode, ms per step (one token of every sequence)")


def _has_scans(report: Results) -> bool:
    """Whether the scan alone was timed of the dense model and of a compressed one."""
    return any(report.dense.name in m.timings and m.ratios for m in report.of_kind("scan"))


def _speedup(axes: Axes, report: Results) -> None:
    """The first compressed model in torch: its kernel beside what is left of it end to end."""
    model = next(iter(report.of_kind("scan")[0].ratios))
    scans = {(m.length, m.batch): m for m in report.of_kind("scan")}
    whole = [m for m in report.of_kind("prefill") if (m.length, m.batch) in scans]
    pairs = {"scan alone": [scans[m.length, m.batch].ratios[model] for m in whole]}
    pairs["whole prefill"] = [m.ratios[model] for m in whole]
    bars = {name: [r.median for r in ratios] for name, ratios in pairs.items()}
    spread = {
        name: [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        for name, ratios in pairs.items()
    }
    _bars(axes, [f"{m.length} tokens" for m in whole], bars, SERIES[2:], spread, label=lambda v: f"{v:.2f}×")
    axes.axhline(1, color=INK, lw=1, ls="--")
    axes.set(title="Speed over dense: the kernel alone, the whole model")


def _sizes(axes: Axes, report: Results) -> None:
    rows = [
        ("parameters", lambda m: m.parameters),
        ("weights on disk", lambda m: m.files[0].bytes),
        ("recurrent state", lambda m: m.state_bytes),
    ]
    if all(model.memory is not None for model in report.models):
        rows.append(("peak memory", lambda m: m.memory.peak))
    bars = {m.name: [100 * read(m) / read(report.dense) for _, read in rows] for m in report.compressed}
    _bars(axes, [name for name, _ in rows], bars, SERIES[1:], label=lambda v: f"{v:.0f} %")
    axes.axhline(100, color=INK, lw=1, ls="--")
    axes.set(title="Size, % of the dense model")


def _trade_off(axes: Axes, report: Results) -> None:
    """Loss above the dense model over time relative to it: filled for prefill, hollow for decoding."""
    colors = {model.name: SERIES[i % len(SERIES)] for i, model in enumerate(report.models)}
    for off, filled in zip(trade_offs(report), (True, False), strict=False):
        for point in off.points:
            color = colors[point.name]
            axes.errorbar(
                point.time,
                point.nats,
                xerr=[[point.time - point.low], [point.high - point.time]],
                color=color,
                marker="o",
                mfc=color if filled else PAPER,
                capsize=3,
                label=point.name if filled else None,
            )
    axes.set(title="Loss above dense, nats", xlabel="time over dense: prefill (filled), decode (hollow)")


def _bars(
    axes: Axes,
    groups: list[str],
    bars: dict[str, list[float]],
    colors: tuple[str, ...],
    spread: dict[str, list[list[float]]] | None = None,
    label: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> None:
    """Grouped bars with their figures at the foot."""
    width = min(0.8 / len(bars), 0.4)
    for number, (name, values) in enumerate(bars.items()):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        errors = None if spread is None else spread[name]
        color = colors[number % len(colors)]
        error_style = {"ecolor": INK, "capsize": 3, "lw": 1}
        axes.bar(places, values, width * 0.92, color=color, label=name, yerr=errors, error_kw=error_style)
        for place, value in zip(places, values, strict=True):  # inside, where neither bars of spread nor lines cross
            figure = label(value) if value else ""
            axes.text(place, 0, figure, ha="center", va="bottom", fontsize=10, weight="bold", color=PAPER)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.08)


def _smallest_batch(measured: tuple[Measurement, ...]) -> list[Measurement]:
    return [m for m in measured if m.batch == measured[0].batch]


def _svg(name: str, draw: Callable[[Axes, Results], None], description: str, report: Results) -> str:
    # a Figure of its own, not pyplot's: no window system, no global state
    style: Any = _STYLE | {"svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.6, 3.7), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, report)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower left", ncols=3)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_html(out.getvalue(), name, description)


def _for_html(svg: str, name: str, description: str) -> str:
    """The bare SVG element in the page's colours, with ids of its own; without the prolog, metadata and namespaces,
    whose addresses nothing loads but which a reader would have to check."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view = re.search(r'viewBox="[^"]*"', head).group()
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page
    for color, variable in _CSS.items():
        body = body.replace(color, variable)
    return f'<svg {view} role="img" aria-label="{description}">{body}'
