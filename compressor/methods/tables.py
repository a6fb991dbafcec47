"""Numbers as the tables of the command line have them."""

from __future__ import annotations

from collections.abc import Sequence


def error_text(value: float | None) -> str:
    """A relative squared error."""
    return "not measured" if value is None else f"{value:.2e}"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, neighbours joined: "0-3 5 8-15"."""
    joined: list[list[int]] = []
    for number in sorted(numbers):
        if joined and number == joined[-1][-1] + 1:
            joined[-1].append(number)
        else:
            joined.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in joined)
