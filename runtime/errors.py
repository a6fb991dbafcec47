"""Everything that can go wrong in a way the user can mend, one class each.

A message is one sentence or two that say what happened, why, and what to do next. The command line prints it
without a traceback and exits with the class's `exit_code`; the codes are part of the documented interface.
"""

_LONGEST = 1400  # characters of a message


class SsmcError(Exception):
    """Base of all errors that ssmc raises on purpose; catch this to catch them all."""

    exit_code = 1

    def __init__(self, message: str = ""):
        """Keep a message as one line that any terminal can print, whatever names and values of a file stand in it."""
        super().__init__(printable(message))


class UsageError(SsmcError):
    """An option or argument has a value that makes no sense (sparsity 1.5, an unknown score, nothing to export)."""

    exit_code = 2


class CheckpointError(SsmcError):
    """A model cannot be read: no such path, not a Mamba, a missing or misshapen tensor, NaN, a pickle with code."""

    exit_code = 3


class CalibrationError(SsmcError):
    """The calibration or evaluation text cannot be read, or there is too little of it."""

    exit_code = 4


class OutputError(SsmcError):
    """The result cannot be written: it exists already, the folder is read-only, the disk is full."""

    exit_code = 5


class VerificationError(SsmcError):
    """A result was computed but differs from what it must equal, so it was not written."""

    exit_code = 6


def printable(text: str) -> str:
    """A text on one line: what is no printable character is escaped, and the middle of a very long one left out."""
    text = " ".join(text.split("\n")) if "\n" in text else text
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-290:]}"
