"""Tables that compare models in a terminal: a line for every model, so that any number of them fits 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from ssmc.cli.terminal import COLOURS, Terminal, table

WIDTH = 80
"""Columns that a table may take, however wide the terminal is: text of this width can be pasted anywhere."""

_NAME = 24  # at most, of a model's name; longer ones are folded
_FRAME = 3  # what separates two columns
_WIDEST = 30  # of a column


@dataclass(frozen=True)
class Figure:
    """What one model has in one column."""

    value: str
    change: str = ""  # against the first model
    verdict: str = ""  # "better", "worse" or anything else

    def text(self) -> Text:
        """Two lines: the value, and the change in its colour."""
        shown = Text(self.value)
        if self.change:
            shown.append("\n" + self.change, style=COLOURS.get(self.verdict, ""))
        return shown

    @property
    def width(self) -> int:
        """Characters of the longer line."""
        return max(len(self.value), len(self.change))


@dataclass(frozen=True)
class Column:
    """One figure for every model."""

    heading: str
    figures: Sequence[Figure]

    @property
    def width(self) -> int:
        """Characters it needs; a heading may be broken between words, and long text is folded."""
        words = max(map(len, self.heading.split()), default=0)
        return min(_WIDEST, max(words, *(figure.width for figure in self.figures)))


def show_models(terminal: Terminal, title: str, names: Sequence[str], columns: Sequence[Column]) -> None:
    """Print a line for every model; where the columns are too many for one table, several below one another."""
    named = min(_NAME, max(map(len, ("model", *names))))
    room = WIDTH - named - _FRAME - 1
    for number, group in enumerate(_fitting(columns, room)):
        shown = table(title if number == 0 else "", "model", *(column.heading for column in group))
        for column, width in zip(shown.columns, (named, *(column.width for column in group)), strict=True):
            column.width = width
        for line, name in enumerate(names):
            shown.add_row(Text(name), *(column.figures[line].text() for column in group))
        terminal.show(shown)


def show_long(terminal: Terminal, title: str, what: str, names: Sequence[str], columns: Sequence[Column]) -> None:
    """Print a line for every figure and model: for many figures of few models."""
    shown = table(title, what, "model", "value", "change")
    shown.columns[0].max_width = shown.columns[1].max_width = _NAME
    shown.columns[1].justify = "left"
    for column in columns:
        for line, (name, figure) in enumerate(zip(names, column.figures, strict=True)):
            change = Text(figure.change, style=COLOURS.get(figure.verdict, ""))
            shown.add_row(Text("" if line else column.heading), Text(name), Text(figure.value), change)
    terminal.show(shown)


def _fitting(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in groups that each fit into `room`, in their order."""
    groups: list[list[Column]] = []
    left = 0
    for column in columns:
        needed = column.width + _FRAME
        if not groups or needed > left:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= needed
    return groups
