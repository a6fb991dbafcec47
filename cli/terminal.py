"""What the user sees: results on stdout, progress and errors on stderr, as much of it as was asked for."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass, field

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ssmc.cli.progress import Bar

COLOURS = {"better": "green", "worse": "red"}  # of a comparison with the dense model


def _stdout() -> Console:
    return Console(highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


@dataclass
class Terminal:
    """Where a command prints; one per run of the program."""

    verbose: bool = False
    quiet: bool = False
    interrupted: str = "interrupted, nothing was written."  # what Ctrl-C is answered with
    out: Console = field(default_factory=_stdout)
    err: Console = field(default_factory=_stderr)

    def say(self, sentence: str, style: str | None = None) -> None:
        """Print a sentence as it is, unless quiet; long lines are left to the terminal to wrap."""
        if not self.quiet:
            self.out.print(sentence, style=style, markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Print a piece of text at once and as it is, even when quiet; no line ends are added."""
        encoding = getattr(self.out.file, "encoding", None) or "utf-8"
        self.out.file.write(text.encode(encoding, "replace").decode(encoding))
        self.out.file.flush()

    def remark(self, sentence: str) -> None:
        """Print something beside the result, where the result itself is what stdout is for; unless quiet."""
        if not self.quiet:
            self.err.print(sentence, style="dim", markup=False, soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Print something the user should know about the result."""
        self.say(f"Note: {sentence}", style="yellow")

    def show(self, table: Table) -> None:
        """Print a table, unless quiet."""
        if not self.quiet:
            self.out.print(table)

    def fail(self, sentence: str, error: BaseException | None = None) -> None:
        """Print what went wrong, even when quiet; the traceback only when verbose."""
        if self.verbose and error is not None:
            self.err.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
        self.err.print(f"Error: {sentence}", style="red", markup=False, soft_wrap=True)

    def progress(self) -> Bar:
        """A progress bar for one piece of work, invisible when quiet or when nobody watches."""
        return Bar(self.err, visible=self.err.is_terminal and not self.quiet)

    def hush_libraries(self) -> None:
        """Keep other libraries' warnings, advice and progress bars to themselves, unless verbose."""
        if self.verbose:
            return
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.hush_hub()

    def hush_hub(self) -> None:
        """The same where only the hub's client is used."""
        if self.verbose:
            return
        from huggingface_hub.utils import disable_progress_bars

        warnings.simplefilter("ignore")
        disable_progress_bars()


def table(title: str, *columns: str) -> Table:
    """An empty table; every column but the first is aligned to the right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left", overflow="fold")
    return result


def size(nbytes: int) -> str:
    """Bytes for people: "7.4 MB"."""
    return decimal(nbytes)
