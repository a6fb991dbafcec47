"""A run that is logged: trackers are started before any work, told what was found, and ended however the run ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ssmc.runtime.errors import OutputError, SsmcError
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.tracking.metrics import numbers_in
from ssmc.runtime.tracking.tracker import RunInfo, Tracker, make_tracker

_LAYER = re.compile(r"layer (\d+)/\d+")  # how the loop over layers calls them in its progress


class Tracking:
    """The trackers of one run, and a clock."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers
        self._start = self._last = time.perf_counter()
        self._layer: int | None = None
        self.seconds: dict[int, float] = {}
        """Seconds of each layer, by its number from 0."""

    def watch(self, progress: Progress = NO_PROGRESS) -> Progress:
        """The same progress, with the time of each layer taken down."""

        def watched(description: str, done: int, total: int) -> None:
            found = _LAYER.match(description)
            self._at(int(found[1]) - 1 if found else None)
            progress(description, done, total)

        return watched

    def log(self, record: Any, step: int | None = None) -> None:
        """Log every number of a record, of one layer or of the whole run."""
        if figures := numbers_in(record):
            for tracker in self._trackers:
                tracker.log(figures, step)

    def layers(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Log what was found out about each layer, and how long it took."""
        self._at(None)
        for number, record in enumerate(findings):
            took = {"seconds": self.seconds[number]} if number in self.seconds else {}
            self.log({**record, **took}, number)

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def _at(self, layer: int | None) -> None:
        now = time.perf_counter()
        if self._layer is not None:
            self.seconds[self._layer] = self.seconds.get(self._layer, 0.0) + now - self._last
        self._layer, self._last = layer, now


@contextmanager
def tracked(names: Sequence[str], run: RunInfo, said: list[str] | None = None) -> Iterator[Tracking]:
    """Log a run while a block computes.

    What goes wrong when trackers are started ends the run before it begins. Later it does not: what was computed is
    worth more than its log.

    Args:
        names: of trackers.
        run: what is told first.
        said: filled with sentences: where each tracker's run is found, or why it is not whole.

    Raises:
        UsageError: there is no such tracker, or its package is missing; nothing has begun then.
        OutputError: a tracker does not start.
    """
    said = [] if said is None else said
    careful = [_Careful(make_tracker(name), said) for name in dict.fromkeys(names)]
    tracking, failed = Tracking(careful), True
    try:
        for tracker in careful:
            tracker.start(run)
        yield tracking
        tracking.log({"total_seconds": tracking.total()})
        failed = False
    finally:
        for tracker in careful:
            tracker.finish(failed)


class _Careful(Tracker):
    """A tracker that is left alone once it has failed."""

    name = "careful"

    def __init__(self, tracker: Tracker, said: list[str]):
        self._tracker, self._said, self._runs = tracker, said, False

    def start(self, run: RunInfo) -> None:
        try:
            self._tracker.start(run)
        except SsmcError:
            raise
        except Exception as error:  # each client has its own
            raise OutputError(f"Logging to {self._failed(error)} Leave out --log-to, or mend it.") from error
        self._runs = True

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        try:
            if self._runs:
                self._tracker.log(figures, step)
        except Exception as error:
            self._runs = False
            self._said.append(f"The log is not whole: {self._failed(error)}")

    def finish(self, failed: bool) -> str:
        try:
            if self._runs:
                self._said.append(f"Logged to {self._tracker.finish(failed)}.")
        except Exception as error:
            self._said.append(f"The log is not whole: {self._failed(error)}")
        return ""

    def _failed(self, error: Exception) -> str:
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        return f"{self._tracker.name} failed ({reason})."
