"""How long work says where it is: a callable that the command line turns into a progress bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(description, done, total)`: what is being done now, and how many of how many steps are over."""


def no_progress(description: str, done: int, total: int) -> None:
    """Report nothing."""


NO_PROGRESS: Progress = no_progress
"""What library calls use unless told otherwise."""
