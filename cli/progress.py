"""A progress bar that is a `Progress` callable: the work reports, rich draws."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """One line with description, bar, count, time passed and time left; gone when the work is over.

    Use it as a context manager and hand it to whatever takes `progress`. A new description starts the bar anew, so the
    times are those of the present piece of work.
    """

    def __init__(self, console: Console, visible: bool):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not visible,
        )
        self._task = self._progress.add_task("", total=None)
        self._description: str | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        """Draw that `done` of `total` steps of `description` are over."""
        if description != self._description:
            self._description = description
            self._progress.reset(self._task, description=description, total=total)
        self._progress.update(self._task, completed=done, total=total)
