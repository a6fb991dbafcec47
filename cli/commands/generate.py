"""`ssmc generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli.checks import check_models
from ssmc.cli.options import (
    GENERAL,
    Device,
    Dtype,
    Revision,
    ScanBackend,
    StateDtype,
    Verbose,
    complete_model,
    dtype_option,
    quiet_option,
    state_dtype_option,
    tokenizer_option,
)
from ssmc.cli.terminal import Terminal
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints.sources import at_revision

if TYPE_CHECKING:
    from ssmc.runtime.models.generation import Generation, LoadedSession

CHOICE, SPEED = "Sampling", "Speed"
QuietText = Annotated[bool, quiet_option("Print the new text only, without the prompt.")]


def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, an export to ONNX, a hub id or `tiny`. Of a folder that `ssmc compress` wrote, the "
            "export for torch is taken.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to continue; `-` reads it from standard input, without the last line break.",
            show_default="--prompt-file",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the text to continue; its last line break is left out.",
            rich_help_panel=GENERAL,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", rich_help_panel=CHOICE)] = 128,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Always take the most probable token. This is the default unless one of the next three is given.",
            rich_help_panel=CHOICE,
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample from the logits divided by this number; 0 is greedy.", rich_help_panel=CHOICE),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the K most probable tokens.", rich_help_panel=CHOICE)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable tokens that together have this probability.", rich_help_panel=CHOICE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=CHOICE)] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Stop before this text; can be given several times.",
            show_default="the tokenizer's end of text",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    tokenizer: Annotated[str | None, tokenizer_option("the model's own", GENERAL)] = None,
    device: Annotated[Device, typer.Option(help="Device to run on.", rich_help_panel=SPEED)] = "auto",
    dtype: Annotated[Dtype | None, dtype_option(SPEED)] = None,
    state_dtype: Annotated[StateDtype | None, state_dtype_option(SPEED)] = None,
    backend: Annotated[
        ScanBackend, typer.Option(help="Implementation of the selective scan.", rich_help_panel=SPEED)
    ] = "auto",
    revision: Revision = None,
    verbose: Verbose = False,
    quiet: QuietText = False,
) -> None:
    """Let a model continue a text. The text appears piece by piece.

    The text goes to standard output, the speed to standard error. The same seed gives the same text.

    **Examples**

        ssmc generate tiny "Once upon a time"

        ssmc generate ssmc-out "The dog" --temperature 0.8 --top-p 0.95 --seed 3

        ssmc generate ssmc-out/onnx --prompt-file story.txt --stop "The end" --quiet > more.txt
    """
    terminal = context.ensure_object(Terminal)
    text = _prompt(prompt, prompt_file)
    if greedy and (temperature, top_k, top_p) != (None, None, None):
        raise UsageError("--greedy takes the most probable token: leave out --temperature, --top-k and --top-p, or it.")
    model = at_revision(model, revision)
    check_models([model])
    import torch

    from ssmc.runtime.models.generation import Generation, Sampling, open_session, warm_up

    sampling = Sampling(temperature, top_k, top_p, seed)
    terminal.hush_libraries()
    with terminal.progress() as progress:
        loaded = open_session(
            model,
            tokenizer=tokenizer,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            backend=backend,
            state_dtype=state_dtype,
            progress=progress,
        )
        writing = Generation(loaded, text, sampling, max_new_tokens, stop or ())
        progress("warming up", 0, 1)
        warm_up(loaded.session)
    terminal.interrupted = "interrupted; the text ends here."
    if not quiet:
        terminal.write(text)
    try:
        for piece in writing:
            terminal.write(piece)
    finally:
        terminal.write("\n")
        _report(terminal, loaded, writing)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue, from wherever the user has it."""
    if (prompt is None) == (file is None):
        raise UsageError("Give the text to continue either as PROMPT (`-` for standard input) or with --prompt-file.")
    if file is None and prompt != "-":
        return prompt or ""
    try:
        data = sys.stdin.buffer.read() if file is None else file.expanduser().read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The prompt in {file or 'standard input'} is not UTF-8 text (byte {error.start}). Convert it to UTF-8."
        ) from error
    except (OSError, RuntimeError) as error:  # the latter for the home of a user who is not there
        raise UsageError(
            f"The prompt in {file} cannot be read: {getattr(error, 'strerror', None) or error}. Check the path."
        ) from error


def _report(terminal: Terminal, loaded: LoadedSession, writing: Generation) -> None:
    """How fast it went; nothing where nothing was computed."""
    if terminal.quiet or not writing.tokens:
        return
    read, wrote = len(writing.prompt_tokens), len(writing.tokens)
    terminal.remark(
        f"{loaded.where}, {loaded.session.runtime}: read {read} tokens ({writing.prefill_speed:,.0f} a second), "
        f"wrote {wrote} ({writing.decode_speed:,.0f} a second)."
    )
