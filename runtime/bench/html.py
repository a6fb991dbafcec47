"""The page: one HTML file with everything in it, made from a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ssmc.runtime.bench import summary, tradeoff
from ssmc.runtime.bench.plots import plots
from ssmc.runtime.bench.results import SCHEMA, Model, Results
from ssmc.runtime.bench.summary import Row


@dataclass(frozen=True)
class Table:
    """Rows under one heading; the columns are the models, or `columns` where they are something else."""

    title: str
    rows: Sequence[Row]
    note: str = ""
    plot: str | None = None
    columns: tuple[str, ...] | None = None


def render(report: Results) -> str:
    """The page as one string, without any address to load from."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))
    return template.render(
        schema=SCHEMA,
        report=report,
        names=report.names,
        findings=[*summary.findings(report), *tradeoff.trade_off_findings(report)],
        recipes=[text for model in report.compressed if (text := _recipe(model))],
        overview=Table("Overview", summary.summary_rows(report)),
        tables=[table for table in _tables(report) if table.rows],
        plots=plots(report),
        settings=_settings(report),
        conditions=_conditions(report),
    )


def _tables(report: Results) -> list[Table]:
    gpu = report.conditions.device == "cuda"
    longest, batch = max(report.settings.lengths), max(report.settings.batch_sizes)
    smallest = min(report.settings.batch_sizes)
    work = f"one prefill of {longest} tokens and decoding at batch {batch}, each model in a fresh process"
    memory = (
        f"What torch's allocator handed out during {work}; the CUDA context is not in it."
        if gpu
        else f"Resident memory of the whole process at its highest during {work}: Python, the libraries and the pages "
        "of the weight files are in it, nothing is subtracted."
    )
    return [
        Table(
            "Prefill over length",
            _timings(report, "prefill"),
            "Logits of the last token; the cache is filled.",
            "prefill",
        ),
        Table("Decode over batch", _timings(report, "decode"), "One step: one token of every sequence.", "decode"),
        Table(
            "The scan alone",
            _timings(report, "scan"),
            "The selective scan of the first layer, on what that layer computes. The rest of a model (projections, "
            "convolution, head) takes the same time however many states are left, so the gain of the whole is smaller.",
            "speedup",
        ),
        Table(
            "Parts of the first layer",
            summary.part_rows(report),
            f"Each alone, on what it reads in that layer at {longest} tokens, batch {smallest}. "
            "conv1d has its activation with it, the scan its gate; dt_proj is the product alone, the head reads one "
            "token of every sequence.",
        ),
        Table(
            "Tokens per second",
            summary.token_rows(report),
            "Tokens of all sequences together; of decoding, one a step and sequence.",
        ),
        Table(
            "2:4 modules",
            summary.sparse24_rows(report),
            "Dense against sparse at the longest prefill and the smallest batch; sparse is used where it is faster.",
            columns=summary.SPARSE24_COLUMNS,
        ),
        Table("Sizes", [*summary.size_rows(report), *_file_rows(report)], "", "sizes"),
        Table("Memory", summary.memory_rows(report), memory),
        Table("Sequences", summary.sequence_rows(report), _sequences_note(report)),
        Table("Perplexity", summary.perplexity_rows(report), _perplexity_note(report)),
        Table(
            "Loss over time",
            tradeoff.trade_off_rows(report),
            "Time over the dense model's (below 1 is faster) and the loss that comes with it: what models of equal "
            "speed lose is what to compare.",
            "tradeoff",
            columns=tradeoff.trade_off_columns(report),
        ),
        Table(
            "For context: transformers' own loop",
            _timings(report, "stock"),
            "The dense model, with transformers' loop over time steps and with the scan of ssmc. All other figures on "
            "this page, the dense ones too, are with the scan of ssmc.",
            columns=("Loop of transformers", "Scan of ssmc"),
        ),
    ]


def _sequences_note(report: Results) -> str:
    if report.conditions.device == "cuda":
        return "From the allocator's peaks of a decoding step at two batch sizes, weights and CUDA context apart."
    return "RAM that was available before the model, less its weights, over the state of a sequence alone."


def _timings(report: Results, kind: str) -> list[Row]:
    names = None if kind == "stock" else report.names
    return [summary.timing_row(measurement, names) for measurement in report.of_kind(kind)]


def _file_rows(report: Results) -> list[Row]:
    """One more line for every format beyond the timed one."""
    rows = []
    for position, model in enumerate(report.models):
        for file in model.files[1:]:
            values = ["" for _ in report.models]
            values[position] = summary.format_bytes(file.bytes)
            blank = ("",) * len(report.compressed)
            rows.append(Row(f"Weights on disk, {file.name}", tuple(values), blank, blank))
    return rows


def _perplexity_note(report: Results) -> str:
    score = report.dense.perplexity
    if score is None or report.text is None:
        return ""
    windows = (
        f"{score.windows} window{'s' if score.windows > 1 else ''} of {score.window} tokens, each from a fresh state"
    )
    return (
        f"{score.tokens:,} predictions on {report.text.source}, {windows}. The change is the mean loss per token above "
        "the dense model's, with the standard error over paired windows."
    )


def _recipe(model: Model) -> str:
    if not model.recipe:
        return ""
    chosen = {key: value for key, value in model.recipe.items() if value is not None}  # None: the default was used
    return f"{model.name}: {', '.join(f'{key} {_value(value)}' for key, value in chosen.items())}"


def _value(value: Any) -> str:
    """A value of a recipe in words; a combined pattern has one for each part."""
    if isinstance(value, dict):
        return " and ".join(f"{content} of {part}" for part, content in value.items())
    return str(value) if not isinstance(value, bool) else "yes" if value else "no"


def _settings(report: Results) -> dict[str, str]:
    settings = report.settings
    rounds = [len(t.seconds) for m in report.measurements for t in m.timings.values()]
    return {
        "Rounds per workload": f"{min(rounds)} to {max(rounds)}, models in turns after a warm-up",
        "Decode": f"{settings.decode_tokens} steps a sample",
        "Scan": settings.backend,
    }


def _conditions(report: Results) -> dict[str, str]:
    """Names and values for the page; what is unknown is left out."""
    c = report.conditions
    load = "" if c.load_average is None else " / ".join(f"{x:.2f}" for x in c.load_average)
    after = "" if report.load_average_after is None else " / ".join(f"{x:.2f}" for x in report.load_average_after)
    shown = {
        "Date": c.date,
        "Device and dtype": f"{c.device}, {c.dtype}",
        "CPU": c.cpu,
        "Cores": f"{c.physical_cores or '?'} physical, {c.logical_cores or '?'} logical",
        "Threads": f"torch {c.torch_threads}, numba {c.numba_threads}",
        "Memory": summary.format_bytes(c.memory_bytes),
        "Load average before (1 / 5 / 15 min)": load,
        "Load average after": after,
        "System": f"{c.system}, Python {c.python}",
        "Versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
    }
    if c.gpu is not None:
        shown["GPU"] = f"{c.gpu.name}, {summary.format_bytes(c.gpu.memory_bytes)}, sm_{c.gpu.compute_capability}"
        shown["GPU driver and CUDA"] = f"{c.gpu.driver or '?'}, {c.gpu.cuda or '?'}"
        shown["GPU power limit"] = f"{c.gpu.power_limit_w:.0f} W" if c.gpu.power_limit_w else ""
        shown["GPU clock (now / most)"] = f"{c.gpu.sm_clock_mhz or '?'} / {c.gpu.max_sm_clock_mhz or '?'} MHz"
        shown["GPU memory clock, power drawn"] = f"{c.gpu.memory_clock_mhz or '?'} MHz, {c.gpu.power_draw_w or '?'} W"
    return {name: value for name, value in shown.items() if value}
