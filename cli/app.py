"""`ssmc` itself: the sub-commands, the options before them, and the one place where errors become sentences."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from ssmc.cli.commands.bench import bench
from ssmc.cli.commands.compress import compress
from ssmc.cli.commands.distill import distill
from ssmc.cli.commands.eval import evaluate
from ssmc.cli.commands.export import export
from ssmc.cli.commands.generate import generate
from ssmc.cli.commands.inspect import inspect
from ssmc.cli.commands.push import push
from ssmc.cli.options import GENERAL, Quiet, Verbose
from ssmc.cli.terminal import Terminal
from ssmc.runtime.errors import OutputError, SsmcError, UsageError
from ssmc.runtime.ranks import ranks

EPILOG = """\
**Examples**

    ssmc compress tiny --sparsity 0.5

    ssmc export --format safetensors

    ssmc bench

**Exit codes**

* 0: done

* 1: an error that is none of the following

* 2: an option or argument is wrong

* 3: the model cannot be read

* 4: the calibration or evaluation text cannot be used

* 5: the result cannot be written

* 6: the result is not what it must be, so it was not written

* 130: interrupted
"""
INTERRUPTED = 130
SHARED = ("compress", "distill", "eval")  # commands whose work several processes can share
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

app = typer.Typer(
    name="ssmc",
    help="Make Mamba models smaller and faster, in one shot: prune, repair, export, measure.",
    epilog=EPILOG,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command(rich_help_panel="Commands, in this order")(inspect)
app.command(rich_help_panel="Commands, in this order")(compress)
app.command(rich_help_panel="Commands, in this order")(distill)
app.command(rich_help_panel="Commands, in this order")(export)
app.command(rich_help_panel="Commands, in this order")(bench)
app.command("eval", rich_help_panel="Commands, in this order")(evaluate)
app.command(rich_help_panel="Commands, in this order")(generate)
app.command(rich_help_panel="Commands, in this order")(push)


def _print_version(wanted: bool) -> None:
    if wanted:
        import platform

        from ssmc.runtime.versions import versions

        found = versions()
        others = ", ".join(f"{name} {version}" for name, version in found.items() if name != "ssmc")
        print(f"ssmc {found['ssmc']} (Python {platform.python_version()}, {others})")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print versions.", rich_help_panel=GENERAL
        ),
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif ranks() > 1 and context.invoked_subcommand not in SHARED:
        raise UsageError(
            f"Several processes cannot share the work of `ssmc {context.invoked_subcommand}`, only that of "
            f"{', '.join(SHARED)}. Leave torchrun out."
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code, as documented in `ssmc --help`.
    """
    # Read when torch is loaded, later: its OpenMP threads otherwise spin for milliseconds after each operation, on
    # cores that our scan's threads wait for. A busy machine gains most.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    terminal = Terminal()
    # A polite kill cleans up as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            code = app(arguments, prog_name="ssmc", standalone_mode=False, obj=terminal)
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone; nothing may be written to it again, not even by Python's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        return _fail(terminal, error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code == INTERRUPTED:  # typer makes this of Ctrl-C
        terminal.fail(terminal.interrupted)
    return code or 0


def _fail(terminal: Terminal, error: BaseException) -> int:
    """Say in one sentence what went wrong; the exit code."""
    if isinstance(error, SystemExit):  # shell completion ends this way
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        terminal.fail(terminal.interrupted, error)
        return INTERRUPTED
    if isinstance(error, SsmcError):
        terminal.fail(_with_notes(error), error)
        return error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "ssmc"
        reason = _one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        terminal.fail(f"{reason}. See `{command} --help`.")
        return error.exit_code
    if _is_memory(error):
        terminal.fail("memory ran out, nothing was written. Fewer --nsamples and a shorter --seqlen need less.", error)
        return 1
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        where = f" ({error.filename})" if error.filename else ""
        terminal.fail(f"the system refused to write{where}: {error.strerror}. Give another folder with --out.", error)
        return OutputError.exit_code
    terminal.fail(
        f"this is a bug in ssmc: {type(error).__name__}: {_one_line(str(error))}. Please report it with the traceback "
        "that --verbose shows.",
        error,
    )
    return 1


def _with_notes(error: BaseException) -> str:
    """What an error says, and what those it passed had to add."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in its own ways."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
