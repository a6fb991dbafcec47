"""The same through the command line: a documented exit code, one sentence, and no result where something failed."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path

from ssmc.cli import main
from tests.fuzz.engine import Outcome, fuzz
from tests.fuzz.guard import Violation, check_message
from tests.fuzz.targets import Target

CODES = range(7)


def fuzz_commands(target: Target, examples: int, number: int, base: Path) -> Outcome:
    """Give mutations of a target's seeds to a command that reads them."""
    out = base / "results" / "out"

    def read(file: Path) -> None:
        out.parent.mkdir(exist_ok=True)
        beside = set(file.parent.iterdir())
        try:
            said, code = call(target.command(file, out))
            judge(said, code)
            if code and (left := [*out.parent.iterdir(), *(set(file.parent.iterdir()) - beside)]):
                raise Violation("left behind", ", ".join(path.name for path in left))
        finally:
            shutil.rmtree(out.parent)

    return fuzz(target, examples, number, read=read, folder=base)


def call(arguments: list[str]) -> tuple[str, int]:
    """What a command says on stderr, and its exit code."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        code = main(arguments)
    sys.stdout.flush()
    return said.getvalue(), code


def judge(said: str, code: int) -> None:
    """See that a command ended as documented.

    Raises:
        Violation: it did not.
    """
    if "bug in ssmc" in said or "Traceback" in said:
        raise Violation("traceback", said[-600:], said[-80:])
    if code not in CODES:
        raise Violation("exit code", f"{code}: {said[-300:]}")
    if code:
        last = said.rstrip("\n").split("\n")[-1]
        if not last.startswith("Error: "):
            raise Violation("message", f"does not end with one line: {said[-300:]!r}")
        check_message(last)
