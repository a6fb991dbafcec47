"""What a tracker is: something that is told the options of a run, its figures step by step, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ssmc.runtime.errors import UsageError
from ssmc.runtime.registry import Registry

PROJECT = "ssmc"


@dataclass(frozen=True)
class RunInfo:
    """A run that is going to be logged.

    Attributes:
        command: "compress", "distill" or "bench".
        name: what to call it.
        options: of the run, in types JSON has.
        folder: where trackers that write files put theirs.
    """

    command: str
    name: str
    options: Mapping[str, Any]
    folder: Path


class Tracker:
    """A place to log to; one object for each run.

    Attributes:
        name: as the user names it.
        package: that it needs; "" where the standard library does.
        version: of that package that it was tried with.
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""

    def start(self, run: RunInfo) -> None:
        """Begin a run; its options are told once."""
        raise NotImplementedError

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Log figures by name, of one step (a layer) or of the whole run."""
        raise NotImplementedError

    def finish(self, failed: bool) -> str:
        """End the run; says where it is found."""
        raise NotImplementedError


TRACKERS: Registry[type[Tracker]] = Registry("ssmc.runtime.tracking.trackers", "TRACKER", "ssmc.trackers")


def tracker_names() -> tuple[str, ...]:
    """The trackers there are."""
    return TRACKERS.names()


def register_tracker(kind: type[Tracker]) -> type[Tracker]:
    """Make a tracker known under its name; one of the same name that was registered before is replaced.

    Raises:
        ValueError: ssmc has one of that name.
    """
    return TRACKERS.register(kind.name, kind)


def make_tracker(name: str) -> Tracker:
    """The tracker of a name, for one run.

    Raises:
        UsageError: there is none, or its package is missing.
    """
    if name not in tracker_names():
        raise UsageError(f"There is nothing to log to called {name!r}. Choose {', '.join(tracker_names())}.")
    kind = TRACKERS.find(name)
    if kind.package and find_spec(kind.package) is None:
        raise UsageError(f"Logging to {name} needs the package {kind.package}: pip install 'ssmc[{name}]'.")
    return kind()
