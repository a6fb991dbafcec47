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
from ssmc.runtime.models.memory import format_bytes


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
        overview=Table("Dense model and compressed models", summary.summary_rows(report)),
        tables=[table for table in _tables(report) if table.rows],
        plots=plots(report),
        settings=_settings(report),
        conditions=_conditions(report),
    )


def _tables(report: Results) -> list[Table]:
    gpu = report.conditions.device == "cuda"
    longest, batch = max(report.settings.lengths), max(report.settings.batch_sizes)
    smallest = min(report.settings.batch_sizes)
    work = f"one prefill of {longest} tokens and decoding at batch {batch}; every model runs in a new process"
    memory = (
        f"Memory that torch's allocator gave out during {work}. The CUDA context is not in it."
        if gpu
        else f"Highest resident memory of the process during {work}. Python, the libraries and the pages of the weight "
        "files are in it; nothing is subtracted."
    )
    return [
        Table("Sequences in memory, counted", summary.footprint_rows(report), _footprint_note()),
        Table(
            "Time of a prefill",
            _timings(report, "prefill"),
            "Reads the prompt, fills the cache and gives the logits of the last token.",
            "prefill",
        ),
        Table(
            "Time of a step of decoding", _timings(report, "decode"), "A step: one token of every sequence.", "decode"
        ),
        Table(
            "Time of the scan alone",
            _timings(report, "scan"),
            "The selective scan of the first layer, on real inputs of that layer. The rest of the model (projections, "
            "convolution, head) takes the same time with any number of states, so the gain of the whole is smaller.",
            "speedup",
        ),
        Table(
            "Time of the parts of the first layer",
            summary.part_rows(report),
            f"Each part alone, on real inputs of that layer: {longest} tokens, batch {smallest}. conv1d includes its "
            "activation, the scan its gate. dt_proj is the matrix product alone. The head reads one token of every "
            "sequence.",
        ),
        Table(
            "Tokens per second",
            summary.token_rows(report),
            "Tokens of all sequences together.",
        ),
        Table(
            "2:4 modules",
            summary.sparse24_rows(report),
            "Dense and sparse time at the longest prefill and the smallest batch. Sparse is used where it is faster.",
            columns=summary.SPARSE24_COLUMNS,
        ),
        Table("Sizes", [*summary.size_rows(report), *_file_rows(report)], "", "sizes"),
        Table("Memory", summary.memory_rows(report), memory),
        Table("Sequences in memory, measured", summary.sequence_rows(report), _sequences_note(report)),
        Table("Perplexity", summary.perplexity_rows(report), _perplexity_note(report)),
        Table(
            "Recall: loss by kind of token, in nats",
            summary.recall_rows(report),
            "A token was seen before if the three tokens that end with it stood in the same window already; a rare one "
            "makes up at most a thousandth of the text. Changes are paired by token, errors are over windows.",
        ),
        Table(
            "Loss and time of every model",
            tradeoff.trade_off_rows(report),
            "Time divided by that of the dense model (below 1 is faster), and the loss. Compare losses of models of "
            "equal speed.",
            "tradeoff",
            columns=tradeoff.trade_off_columns(report),
        ),
        Table(
            "Stock transformers: time of a prefill",
            _timings(report, "stock"),
            "The dense model with transformers' own loop over tokens, and with the scan of ssmc. All other figures on "
            "this page use the scan of ssmc, those of the dense model too.",
            columns=("Loop of transformers", "Scan of ssmc"),
        ),
    ]


def _footprint_note() -> str:
    return (
        "Exact, from the sizes of the models: weights, SSM states in float32, windows of the convolutions and, in a "
        "hybrid, keys and values in the type the model computes in. ONNX graphs hold states twice, as a step reads and "
        "writes them. Activations of a step are not in it."
    )


def _sequences_note(report: Results) -> str:
    if report.conditions.device == "cuda":
        return "From the allocator's peaks of a step of decoding at two batch sizes, without weights and CUDA context."
    return "Free memory before the model was loaded, minus its weights, divided by the recurrent state of a sequence."


def _timings(report: Results, kind: str) -> list[Row]:
    names = None if kind == "stock" else report.names
    return [summary.timing_row(measurement, names) for measurement in report.of_kind(kind)]


def _file_rows(report: Results) -> list[Row]:
    """One more line for every format beyond the timed one."""
    rows = []
    for position, model in enumerate(report.models):
        for file in model.files[1:]:
            values = ["" for _ in report.models]
            values[position] = format_bytes(file.bytes)
            blank = ("",) * len(report.compressed)
            rows.append(Row(f"Weights on disk, {file.name}", tuple(values), blank, blank))
    return rows


def _perplexity_note(report: Results) -> str:
    score = report.dense.perplexity
    if score is None or report.text is None:
        return ""
    windows = (
        f"{score.windows} window{'s' if score.windows > 1 else ''} of {score.window} tokens, each from an empty state"
    )
    return (
        f"{score.tokens:,} predictions on {report.text.source}, {windows}. The change is the mean loss per token minus "
        "that of the dense model, with the standard error over paired windows."
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
        "Memory": format_bytes(c.memory_bytes),
        "Load average before (1 / 5 / 15 min)": load,
        "Load average after": after,
        "System": f"{c.system}, Python {c.python}",
        "Versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
    }
    if c.gpu is not None:
        shown["GPU"] = f"{c.gpu.name}, {format_bytes(c.gpu.memory_bytes)}, sm_{c.gpu.compute_capability}"
        shown["GPU driver and CUDA"] = f"{c.gpu.driver or '?'}, {c.gpu.cuda or '?'}"
        shown["GPU power limit"] = f"{c.gpu.power_limit_w:.0f} W" if c.gpu.power_limit_w else ""
        shown["GPU clock (now / most)"] = f"{c.gpu.sm_clock_mhz or '?'} / {c.gpu.max_sm_clock_mhz or '?'} MHz"
        shown["GPU memory clock, power drawn"] = f"{c.gpu.memory_clock_mhz or '?'} MHz, {c.gpu.power_draw_w or '?'} W"
    return {name: value for name, value in shown.items() if value}
