"""`ssmc bench`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ssmc.cli.checks import check_compressed, check_models
from ssmc.cli.comparison import Column, Figure, show_long, show_models
from ssmc.cli.options import (
    MODELS,
    OUTPUT,
    QUALITY,
    CompressedDirectory,
    DenseRevision,
    Device,
    Dtype,
    MaxWindows,
    Quiet,
    Runtimes,
    ScanBackend,
    StateDtype,
    Verbose,
    Window,
    complete_model,
    dtype_option,
    heldout_option,
    state_dtype_option,
    tokenizer_option,
    words,
)
from ssmc.cli.terminal import Terminal, table
from ssmc.cli.tracking import LOGS, LogDir, LogTo, logged
from ssmc.runtime.models.checkpoints.sources import at_revision

if TYPE_CHECKING:
    from rich.table import Table

    from ssmc.runtime.bench import Report, Row

SPEED = "Speed and memory"


def numbers(text: str) -> tuple[int, ...]:
    """Parse "128,512"."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 128,512") from None


def bench(
    context: typer.Context,
    directory: CompressedDirectory = Path("ssmc-out"),
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Dense model to compare with.",
            show_default="the one DIR was made from",
            autocompletion=complete_model,
            rich_help_panel=MODELS,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Model to measure; can be given several times.",
            show_default="the exports in DIR",
            autocompletion=complete_model,
            rich_help_panel=MODELS,
        ),
    ] = None,
    smaller: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Smaller dense model with the same tokenizer, to compare at equal speed; can be given several times.",
            show_default=False,
            autocompletion=complete_model,
            rich_help_panel=MODELS,
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="INT,INT,...", help="Lengths of the prompts, in tokens.", rich_help_panel=SPEED)
    ] = "128,512,2048",
    batch_sizes: Annotated[
        str, typer.Option(metavar="INT,INT,...", help="Numbers of sequences that run at once.", rich_help_panel=SPEED)
    ] = "1,8",
    decode_tokens: Annotated[int, typer.Option(help="Steps of decoding in one timing.", rich_help_panel=SPEED)] = 32,
    repeats: Annotated[int, typer.Option(help="Most rounds of each timing.", rich_help_panel=SPEED)] = 15,
    time_budget: Annotated[
        float, typer.Option(help="Seconds to spend on timing, approximately.", rich_help_panel=SPEED)
    ] = 90.0,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Also decode 1, 2, 4, ... sequences at once, up to this number or until memory is full.",
            show_default="on a GPU until memory is full, on a CPU 0: not at all",
            rich_help_panel=SPEED,
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Device to run on.", rich_help_panel=SPEED)] = "auto",
    dtype: Annotated[Dtype | None, dtype_option(SPEED)] = None,
    state_dtype: Annotated[StateDtype, state_dtype_option(SPEED, ", of all models but the dense one")] = "float32",
    backend: Annotated[
        ScanBackend, typer.Option(help="Implementation of the selective scan.", rich_help_panel=SPEED)
    ] = "auto",
    runtime: Runtimes = "torch,onnx,llama.cpp",
    stock: Annotated[
        bool,
        typer.Option("--stock/--no-stock", help="Also time transformers' own loop over tokens.", rich_help_panel=SPEED),
    ] = True,
    text: Annotated[str | None, heldout_option("the embedded stories")] = None,
    tokenizer: Annotated[str | None, tokenizer_option("the dense model's", QUALITY)] = None,
    window: Window = 1024,
    max_windows: MaxWindows = 32,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Existing folder to write the report to.",
            show_default="DIR; with --model the current folder",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    log_to: LogTo = None,
    log_dir: LogDir = LOGS,
    revision: DenseRevision = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure the dense model and the compressed models: size, memory, speed, perplexity.

    All models are timed in turns, after a warm-up. Tables show medians, and ratios with a confidence interval. The
    report is written as `bench.json` and as `bench.html`, a page with plots; an earlier report is replaced.

    **Examples**

        ssmc bench

        ssmc bench smaller --text my-heldout.jsonl --lengths 512,4096 --batch-sizes 1

        ssmc bench --dense ./my-mamba --model smaller/safetensors --model smallest/safetensors --out .

        ssmc bench ours --smaller ./my-plain-smaller-mamba
    """
    terminal = context.ensure_object(Terminal)
    prefills, batches = numbers(lengths), numbers(batch_sizes)
    if revision is not None:
        dense = at_revision(dense or "", revision)
    check_models([dense, *(model or ()), *(smaller or ())])
    if not model:
        check_compressed(directory)
    import torch

    from ssmc.runtime.bench import benchmark, check_output

    terminal.hush_libraries()
    if out is None:
        out = Path(".") if model else directory
    if out.exists() or out != directory:  # without DIR there is more to say than that the report has no place
        check_output(out)
    options = {"directory": directory, "dense": dense, "model": model, "lengths": lengths, "batch_sizes": batch_sizes}
    with logged(terminal, log_to, log_dir, "bench", out, options) as tracking:
        with terminal.progress() as progress:
            report = benchmark(
                directory,
                dense=dense,
                models=model or None,
                smaller=smaller,
                lengths=prefills,
                batch_sizes=batches,
                decode_tokens=decode_tokens,
                repeats=repeats,
                time_budget=time_budget,
                device=device,
                dtype=None if dtype is None else getattr(torch, dtype),
                text=text,
                tokenizer=tokenizer,
                window=window,
                max_windows=max_windows or None,
                stock=stock,
                backend=backend,
                state_dtype=state_dtype,
                runtimes=words(runtime),
                max_batch=max_batch,
                progress=progress,
            )
        tracking.log(_figures(report))
    written = report.write(out)
    _report(terminal, report)
    terminal.say(f"Wrote {' and '.join(str(path) for path in written)}.")


def _figures(report: Report) -> dict[str, Any]:
    """What is logged of a report: sizes and losses by model, and the median of every measurement."""
    found: dict[str, Any] = {}
    for model in report.models:
        entry: dict[str, Any] = {"parameters": model.parameters, "state_bytes": model.state_bytes}
        entry |= {"perplexity": model.perplexity.ppl} if model.perplexity else {}
        entry |= {"excess_nats": model.excess.nats} if model.excess else {}
        found[model.name] = entry
    for measured in report.measurements:
        place = "-".join(filter(None, (measured.kind, measured.part, f"{measured.batch}x{measured.length}")))
        for name, timing in measured.timings.items():
            found.setdefault(name, {})[place] = {"seconds": timing.median, "tokens": measured.tokens / timing.median}
    return found


def _report(terminal: Terminal, report: Report) -> None:
    from ssmc.runtime.bench import findings, summary, summary_rows
    from ssmc.runtime.bench.tradeoff import trade_off_columns, trade_off_findings, trade_off_rows

    names = report.names
    overview = [*summary_rows(report), *summary.sequence_rows(report)]
    show_models(terminal, "Dense model and compressed models", names, [_column(row, short=True) for row in overview])
    if parts := report.of_kind("part"):
        title = f"Time of the parts of the first layer, {parts[0].length} tokens, batch {parts[0].batch}"
        show_long(terminal, title, "part", names, [_column(row, short=True) for row in summary.part_rows(report)])
    if report.of_kind("throughput"):
        show_long(terminal, "Tokens per second", "phase", names, [_column(row) for row in summary.token_rows(report)])
    if modules := summary.sparse24_rows(report):
        terminal.show(_rows("2:4 modules", ("", *summary.SPARSE24_COLUMNS), modules))
    if compared := trade_off_rows(report):
        figures = zip(*([Figure(value) for value in row.values] for row in compared), strict=True)
        columns = [Column(*pair) for pair in zip(trade_off_columns(report), figures, strict=True)]
        show_models(terminal, "Loss and time of every model", [row.metric for row in compared], columns)
    for sentence in [*findings(report), *trade_off_findings(report)]:
        terminal.say(f"- {sentence}")
    for note in report.notes:
        terminal.note(note)
    c = report.conditions
    where = c.gpu.name if c.gpu else f"{c.cpu}, {c.torch_threads} threads"
    terminal.say(f"Measured on {where}, {c.dtype}, torch {c.versions['torch']}; load {_load(report)}.", style="dim")


def _column(row: Row, short: bool = False) -> Column:
    """A row of a report as a column of a table of models.

    Args:
        row: of a report.
        short: leave out the quartiles of a time, which bench.html and bench.json have.
    """
    values = [value.partition(" (")[0] for value in row.values] if short else row.values
    changes, verdicts = ("", *row.changes), ("", *row.verdicts)
    figures = [Figure(*cell) for cell in zip_longest(values, changes, verdicts, fillvalue="")]
    return Column(row.metric, figures)


def _rows(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """A table of rows that have a name each and no changes."""
    shown = table(title, *columns)
    for row in rows:
        shown.add_row(row.metric, *map(Text, row.values))
    return shown


def _load(report: Report) -> str:
    """How busy the machine was, which spoils timings when it was busy with something else."""
    loads = (report.conditions.load_average, report.load_average_after)
    return " -> ".join(f"{load[0]:.1f}" for load in loads if load) or "unknown"
