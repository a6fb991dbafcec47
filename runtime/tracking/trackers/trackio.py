"""trackio, by its own client: local, in TRACKIO_DIR where that is set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from ssmc.runtime.tracking.tracker import PROJECT, RunInfo, Tracker


class TrackioTracker(Tracker):
    """One run of the project "ssmc"."""

    name = "trackio"
    package = "trackio"

    def start(self, run: RunInfo) -> None:
        """Begin a run."""
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / "trackio").resolve()))
        import trackio  # which reads that

        self._trackio: Any = trackio
        self._where = os.environ["TRACKIO_DIR"]
        config = {**run.options, "command": run.command}
        with redirect_stdout(StringIO()):  # it advertises its commands there
            trackio.init(project=PROJECT, name=run.name, config=config, embed=False)

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Log figures."""
        self._trackio.log(dict(figures), step=step)

    def finish(self, failed: bool) -> str:
        """End the run."""
        self._trackio.log({"failed": int(failed)})
        with redirect_stdout(StringIO()):
            self._trackio.finish()
        return self._where


TRACKER = TrackioTracker
