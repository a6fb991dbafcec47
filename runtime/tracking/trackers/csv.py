"""A CSV file of the run's own: one figure a line, by the standard library."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ssmc.runtime.errors import OutputError
from ssmc.runtime.tracking.tracker import RunInfo, Tracker

COLUMNS = ("kind", "step", "name", "value")  # kind: option, figure or end


class CsvTracker(Tracker):
    """FOLDER/NAME.csv, or NAME-2.csv where there is one; every line is on disk as soon as it is known."""

    name = "csv"

    def start(self, run: RunInfo) -> None:
        """Open the file, and write the options."""
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            self._path, self._file = _opened(run)
        except OSError as error:
            raise OutputError(
                f"{run.folder} cannot be written: {error.strerror}. Choose another with --log-dir."
            ) from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._write(COLUMNS)
        self._write(("option", "", "command", run.command))
        for name, value in run.options.items():
            self._write(("option", "", name, value if isinstance(value, str) else json.dumps(value)))

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Write a line for each."""
        for name, value in figures.items():
            self._write(("figure", "" if step is None else step, name, repr(value)))

    def finish(self, failed: bool) -> str:
        """Write how it ended."""
        self._write(("end", "", "status", "failed" if failed else "done"))
        self._file.close()
        return str(self._path)

    def _write(self, line: tuple[Any, ...]) -> None:
        self._writer.writerow(line)
        self._file.flush()


def _opened(run: RunInfo) -> tuple[Path, IO[str]]:
    """A new file: nothing is overwritten, nor appended to."""
    number = 1
    while True:
        path = run.folder / (f"{run.name}.csv" if number == 1 else f"{run.name}-{number}.csv")
        try:
            return path, path.open("x", encoding="utf-8", newline="")
        except FileExistsError:
            number += 1


TRACKER = CsvTracker
