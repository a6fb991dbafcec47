"""--log-to and --log-dir: what a command measures goes to mlflow, wandb, trackio or a CSV file as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmc.cli.options import words
from ssmc.cli.terminal import Terminal
from ssmc.compressor.options.flags import OUTPUT
from ssmc.runtime.tracking import RunInfo, Tracking, make_tracker, tracked, tracker_names


def _known(log_to: str | None) -> str | None:
    """What --log-to names, once it is known that all of it is there: at once, before torch is loaded."""
    for name in () if log_to is None else words(log_to):
        make_tracker(name)
    return log_to


LogTo = Annotated[
    str | None,
    typer.Option(
        callback=_known,
        metavar="|".join(tracker_names()),
        help="Log options, figures and times there as well; several with commas between.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
LogDir = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for the files of --log-to, where it writes some.", rich_help_panel=OUTPUT),
]
LOGS = Path("ssmc-logs")
NAMES = ("log_to", "log_dir")  # of these options


@contextmanager
def logged(
    terminal: Terminal, log_to: str | None, log_dir: Path, command: str, out: Path, options: Mapping[str, Any]
) -> Iterator[Tracking]:
    """Log a run while a block computes, and say where."""
    said: list[str] = []
    plain = {
        key: value if isinstance(value, (int, float, str, dict, list)) else str(value) for key, value in options.items()
    }
    run = RunInfo(command, out.resolve().name or command, plain, log_dir)
    with tracked(words(log_to) if log_to else (), run, said) as tracking:
        yield tracking
    for sentence in said:
        terminal.say(sentence)
