"""`ssmc eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli.checks import DEFAULT_DIRECTORY, check_compressed, check_models
from ssmc.cli.comparison import Column, Figure, show_models
from ssmc.cli.options import (
    MODELS,
    OUTPUT,
    QUALITY,
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
from ssmc.cli.terminal import Terminal
from ssmc.runtime.models.checkpoints.sources import at_revision
from ssmc.runtime.ranks import is_first

if TYPE_CHECKING:
    from ssmc.runtime.evaluation import EvalReport, Score

TASKS, SPEED = "Tasks", "Speed"


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models to score, the one to compare with first; or one folder that `ssmc compress` wrote, which "
            "stands for its dense model and its exports.",
            show_default="ssmc-out",
            autocompletion=complete_model,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Dense model to compare with.",
            show_default="the first, or the one the folder was made from",
            autocompletion=complete_model,
            rich_help_panel=MODELS,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,TASK,...",
            help="Tasks of lm-eval, such as piqa, openbookqa, winogrande, arc_easy, arc_challenge, lambada_openai.",
            show_default="none, only perplexity",
            rich_help_panel=TASKS,
        ),
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of documents to take from each task.",
            show_default="all of them",
            rich_help_panel=TASKS,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the documents: TASK.jsonl for every task, wikitext2.jsonl for perplexity. Nothing is "
            "downloaded.",
            show_default="the data sets of the hub",
            rich_help_panel=TASKS,
        ),
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity/--no-perplexity", help="Measure perplexity or not.", rich_help_panel=QUALITY)
    ] = True,
    recall: Annotated[
        bool,
        typer.Option(
            "--recall",
            help="Show the loss by kind of token: repeated from before in the text, from more than 100 tokens back, "
            "rare ones among them, and new ones. Perplexity hides what a model no longer remembers. Ask for passkeys "
            "hidden in the text and for values of listed keys, too, by distance.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    text: Annotated[str | None, heldout_option("wikitext2, its test split")] = None,
    window: Window = 2048,
    max_windows: MaxWindows = 0,
    tokenizer: Annotated[str | None, tokenizer_option("that of the first model", MODELS)] = None,
    batch_size: Annotated[
        int, typer.Option(help="Sequences of a task that run at once; no score depends on it.", rich_help_panel=SPEED)
    ] = 8,
    device: Annotated[Device, typer.Option(help="Device to run on.", rich_help_panel=SPEED)] = "auto",
    dtype: Annotated[Dtype | None, dtype_option(SPEED)] = None,
    state_dtype: Annotated[StateDtype, state_dtype_option(SPEED, ", of all models but the first")] = "float32",
    backend: Annotated[
        ScanBackend, typer.Option(help="Implementation of the selective scan.", rich_help_panel=SPEED)
    ] = "auto",
    runtime: Runtimes = "torch,onnx,llama.cpp",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write the report to; an earlier report is replaced.",
            show_default="eval.json, in the folder that is evaluated or in the current one",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    revision: DenseRevision = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score models: perplexity on a text, and tasks of lm-eval.

    All models read the same documents. The difference to the first model has a standard error of its own. Tasks need
    lm-eval: `pip install 'ssmc[eval]'`. With `torchrun --nproc-per-node N -m ssmc eval ...` N processes share the
    windows and documents.

    **Examples**

        ssmc eval --tasks piqa,arc_easy

        ssmc eval tiny smaller/safetensors --tasks lambada_openai --limit 200 --data my-data

        ssmc eval smaller --text my-heldout.jsonl
    """
    terminal = context.ensure_object(Terminal)
    if revision is not None:
        dense = at_revision(dense or "", revision)
    if models:
        check_models([dense, *models])
    else:
        check_compressed(DEFAULT_DIRECTORY)
    import torch

    from ssmc.runtime.evaluation import check_output, evaluate_models, output_path

    terminal.hush_libraries()
    _hush_lm_eval(terminal)
    terminal.quiet = terminal.quiet or not is_first()
    place = output_path(models or (), out)
    check_output(place)
    with terminal.progress() as progress:
        report = evaluate_models(
            models or (),
            tasks,
            dense=dense,
            limit=limit,
            data=data,
            text=text,
            perplexity=perplexity,
            recall=recall,
            window=window,
            max_windows=max_windows or None,
            batch_size=batch_size,
            tokenizer=tokenizer,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            backend=backend,
            state_dtype=state_dtype,
            runtimes=words(runtime),
            progress=progress,
        )
    if not is_first():
        return
    written = report.write(place)
    _report(terminal, report, recall)
    terminal.say(f"Wrote {written}.")


def _hush_lm_eval(terminal: Terminal) -> None:
    if terminal.verbose:
        return
    import logging

    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _report(terminal: Terminal, report: EvalReport, recall: bool) -> None:
    columns = []
    for row in report.rows():
        metric = row[0].metric if row[0].filter == "none" else f"{row[0].metric} ({row[0].filter})"
        figures = [Figure(_value(score), _difference(score), score.verdict) for score in row]
        columns.append(Column(f"{row[0].task}, {metric}", figures))
    columns[1:1] = [] if recall else _kind_columns(report, ("far",), "loss on tokens seen > 100 back, ")
    show_models(terminal, "Scores of every model", [model.name for model in report.models], columns)
    terminal.say(
        "±: one standard error; of a difference, over the same documents (windows of text, for perplexity). Coloured "
        "where it is beyond two.",
        style="dim",
    )
    if recall:
        _show_recall(terminal, report)
        _show_constructed(terminal, report)
    for note in report.notes:
        terminal.note(note)
    read = [] if report.text is None else [f"{report.models[0].perplexity.tokens:,} tokens of {report.text.source}"]
    read += [f"{task.documents:,} of {task.available:,} documents of {task.name}" for task in report.tasks]
    terminal.say(f"Scored on {', '.join(read)}; {report.dtype} on {report.device}.", style="dim")


SHOWN = ("repeated", "far", "rare", "new")  # kinds of tokens in the table; the report has all


def _show_recall(terminal: Terminal, report: EvalReport) -> None:
    """The loss by kind of token: nats, and above it what is lost against the first model."""
    names = [model.name for model in report.models]
    show_models(terminal, "Loss by kind of token, in nats", names, _kind_columns(report, SHOWN))
    terminal.say(
        "repeated: the token ends three that stood before in the same window; far: more than 100 tokens back; rare: of "
        "those repeated, tokens that make up at most a thousandth of the text each; new: all others.",
        style="dim",
    )


def _kind_columns(report: EvalReport, kinds: Sequence[str], heading: str = "") -> list[Column]:
    """A column for each kind of tokens that the text has."""
    from ssmc.runtime.measure.recall import of_kind

    columns = []
    for kind in kinds:
        row = [found for model in report.models if (found := of_kind(model.recall, kind)) is not None]
        if len(row) == len(report.models):
            figures = [Figure(_nats(one.nll, one.stderr), _nats(one.excess, one.excess_stderr, "+")) for one in row]
            columns.append(Column(f"{heading or kind + ', '}{row[0].tokens:,} tokens", figures))
    return columns


def _show_constructed(terminal: Terminal, report: EvalReport) -> None:
    """Answers to constructed questions, by distance, where the first model has some."""
    from ssmc.runtime.evaluation.constructed import LEAST, TASKS

    for number, dense in enumerate(report.dense.constructed):
        if dense.answers[0].accuracy < LEAST:
            continue  # a note says so
        columns = []
        for place, asked in enumerate(dense.answers):
            heading = "all" if place == 0 else f"{asked.low} to {asked.high} back"
            found = [model.constructed[number].answers[place] for model in report.models]
            figures = [Figure(f"{one.accuracy:.1%} ± {one.stderr:.1%}") for one in found]
            columns.append(Column(f"{heading}, {asked.asked} asked", figures))
        names = [model.name for model in report.models]
        show_models(terminal, f"Right answers: {TASKS[dense.task]}", names, columns)


def _nats(value: float | None, stderr: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}{_plus_minus(stderr)}"


def _value(score: Score) -> str:
    return f"{score.value:.4g}{_plus_minus(score.stderr)}"


def _difference(score: Score) -> str:
    difference = score.difference
    if difference is None:
        return ""
    return f"{difference.value:+.4g}{_plus_minus(difference.stderr)}"


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.2g}"
