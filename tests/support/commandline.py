"""Run the command line as a user does and look at what came back."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ssmc.cli import main

SSMC = Path(sys.executable).parent / "ssmc"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """stdout without the line breaks and frames of tables and help texts."""
        return " ".join(self.out.replace("│", " ").split())

    def sentence(self, code: int) -> str:
        """The one line on stderr of a command that failed with `code`, without a traceback and without the prefix."""
        assert self.code == code, (self.code, self.out, self.err)
        (line,) = self.err.splitlines()
        assert line.startswith("Error: ")
        assert "bug in ssmc" not in line
        return line.removeprefix("Error: ")


def run(capsys, *arguments: object) -> Outcome:
    """In this process: seconds faster, the same code from `main` on."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return Outcome(code, ANSI.sub("", captured.out), ANSI.sub("", captured.err))


def run_process(*arguments: object, cwd: Path, **environment: str) -> Outcome:
    """As its own process: what really is installed, printed and returned."""
    done = subprocess.run(
        [SSMC, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Outcome(done.returncode, ANSI.sub("", done.stdout), ANSI.sub("", done.stderr))


PROMPTS = ("Once upon a time", "The dog", "One day, a girl named Lily went to the")
