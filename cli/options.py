"""Options that several sub-commands share, and the words their values are chosen from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ssmc.cli.terminal import Terminal
from ssmc.compressor.options.flags import GENERAL, OUTPUT
from ssmc.compressor.options.patterns import combinable, patterns, score_names

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
StateDtype = Literal["float32", "float16", "int8"]
ScanBackend = Literal["auto", "cpu", "triton", "mamba-ssm", "reference"]

MODELS, QUALITY = "Models", "Perplexity"


def _switch(name: str) -> Callable[[typer.Context, bool], bool]:
    def switch(context: typer.Context, value: bool) -> bool:
        if value:
            setattr(context.ensure_object(Terminal), name, True)
        return value

    return switch


Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="NAME",
        help="Branch, tag or commit of a model on the hub; the same as owner/name@NAME.",
        show_default="the newest",
        rich_help_panel=GENERAL,
    ),
]
DenseRevision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="NAME",
        help="Branch, tag or commit of the --dense model on the hub. Of any other model: owner/name@NAME.",
        show_default="the newest",
        rich_help_panel=GENERAL,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_switch("verbose"),
        help="Show the warnings of other libraries, and the traceback of an error.",
        rich_help_panel=GENERAL,
    ),
]


def quiet_option(help: str) -> Any:
    """--quiet; `help` says what is still printed."""
    return typer.Option("--quiet", "-q", callback=_switch("quiet"), help=help, rich_help_panel=GENERAL)


Quiet = Annotated[bool, quiet_option("Print nothing but errors.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What the process may take of memory, like 8GiB. What does not fit lies on disk meanwhile; a run that "
        "needs more is refused, with the least that it needs.",
        show_default="as much as it needs",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace an earlier result of ssmc.", rich_help_panel=OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the gradient steps of a run with the same options that was interrupted.",
        rich_help_panel=OUTPUT,
    ),
]
Window = Annotated[int, typer.Option(help="Tokens that the model reads at once.", rich_help_panel=QUALITY)]
MaxWindows = Annotated[
    int,
    typer.Option(help="Number of windows to score, from the start of the text; 0 means all.", rich_help_panel=QUALITY),
]
Runtimes = Annotated[
    str,
    typer.Option(
        metavar="torch|onnx|llama.cpp|...",
        help="Runtimes whose exports in the folder are measured; several with commas between.",
        rich_help_panel=MODELS,
    ),
]
CompressedDirectory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that `ssmc compress` wrote.", show_default=True)
]


def tokenizer_option(default: str, panel: str) -> Any:
    """--tokenizer; `default` says where it is looked for otherwise."""
    return typer.Option(
        metavar="SRC", help="Folder or hub id of the tokenizer.", show_default=default, rich_help_panel=panel
    )


def heldout_option(default: str) -> Any:
    """--text; `default` says what is read otherwise."""
    return typer.Option(
        metavar="SRC",
        help="Held-out text; takes the same as `ssmc compress --calib`.",
        show_default=default,
        rich_help_panel=QUALITY,
    )


def dtype_option(panel: str) -> Any:
    """--dtype, to compute in."""
    return typer.Option(
        help="Number type of weights and activations.",
        show_default="float32 on a CPU, as stored on a GPU",
        rich_help_panel=panel,
    )


def state_dtype_option(panel: str, whose: str = "") -> Any:
    """--state-dtype; `whose` says of which models."""
    return typer.Option(
        help=f"Number type that SSM states are kept in between tokens{whose}; they are computed in float32.",
        show_default=True if whose else "float32",
        rich_help_panel=panel,
    )


def words(text: str) -> tuple[str, ...]:
    """Parse "torch,onnx"."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def complete_pattern(incomplete: str) -> list[str]:
    """What the shell offers for --pattern: a word, or one more behind a +."""
    start, plus, _ = incomplete.rpartition("+")
    every = (*patterns(), "2:4", "4:8")  # and any other N:M
    words = [word for word in combinable() if word not in start.split("+")] if plus else every
    return [word for word in (start + plus + word for word in words) if word.startswith(incomplete)]


def complete_score(incomplete: str) -> list[str]:
    """What the shell offers for --score: a word, or one for a part of the pattern."""
    split = max(incomplete.rfind("="), incomplete.rfind(",")) + 1
    return [incomplete[:split] + word for word in score_names() if word.startswith(incomplete[split:])]


def complete_model(incomplete: str) -> list[str]:
    """What the shell offers for MODEL: the embedded model and folders."""
    start = Path(incomplete)
    parent, prefix = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    try:
        found = [p for p in parent.iterdir() if p.is_dir() and p.name.startswith(prefix)]
        folders = sorted(f"{p}/" for p in found if prefix or not p.name.startswith("."))
    except OSError:
        folders = []
    return [word for word in ("tiny", "tiny-mamba2", "tiny-hybrid", *folders) if word.startswith(incomplete)]
