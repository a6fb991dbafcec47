"""What the command line needs to know about an option beside its type: help text, placeholder, heading.

It stands with the field, so that an option is declared once: `CompressConfig` and `Goal` make recipes and Python calls,
`ssmc.cli` makes its options out of the same fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

METHOD, GOAL, QUANTIZATION = "Method", "Goal of a search", "Quantisation"
CALIBRATION, OUTPUT, GENERAL = "Calibration", "Output", "General"


@dataclass(frozen=True)
class Flag:
    """How an option looks on the command line.

    Attributes:
        help: what it does, in plain sentences; a function where the text depends on what is registered.
        panel: the heading it stands under.
        metavar: the placeholder for its value.
        default_text: shown in place of the default; "" shows none.
        typed: what the command line reads it as, where the field takes more kinds of values than a shell can write.
        switch: the two names of a yes or no, "--repair/--no-repair".
        completes: what the shell completes its values from: "pattern", "score" or "model".
    """

    help: str | Callable[[], str]
    panel: str = METHOD
    metavar: str | None = None
    default_text: str | None = None
    typed: type | None = None
    switch: str | None = None
    completes: str | None = None

    @property
    def text(self) -> str:
        """The help text."""
        return self.help if isinstance(self.help, str) else self.help()


def flags_of(options: type[BaseModel]) -> Iterator[tuple[str, Flag, Any, Any]]:
    """The options of a model that have a place on the command line: name, flag, type and default."""
    for name, field in options.model_fields.items():
        flag = next((entry for entry in field.metadata if isinstance(entry, Flag)), None)
        if flag is not None:
            yield name, flag, field.annotation, field.default
