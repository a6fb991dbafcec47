"""The report of a benchmark: what it found out, as the files people read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ssmc.runtime.bench.results import SCHEMA, Results
from ssmc.runtime.errors import OutputError
from ssmc.runtime.files import finite, write_text

JSON_NAME, HTML_NAME = "bench.json", "bench.html"


@dataclass(frozen=True)
class Report(Results):
    """Results that can be written."""

    def write(self, directory: str | Path) -> list[Path]:
        """Write bench.json and bench.html into an existing folder, replacing those of an earlier benchmark.

        Raises:
            OutputError: see `check_output`.
        """
        from ssmc.runtime.bench.html import render  # needs matplotlib and jinja2, which results do not

        directory = Path(directory).expanduser()
        check_output(directory)
        text = json.dumps(finite(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
        written = {directory / JSON_NAME: text + "\n", directory / HTML_NAME: render(self)}
        for path, content in written.items():
            write_text(path, content)
        return list(written)


def check_output(directory: str | Path) -> None:
    """See, before minutes of work, that a report can be written.

    Raises:
        OutputError: `directory` is no folder, or holds a bench.json or bench.html that is not ours.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise OutputError(f"{directory} is not a folder, so the report cannot be written there. Name one that exists.")
    for name in (JSON_NAME, HTML_NAME):
        path = directory / name
        try:
            foreign = path.exists() and SCHEMA.partition("/")[0] not in path.read_text(encoding="utf-8")[:2000]
        except (OSError, UnicodeDecodeError):
            foreign = True
        if foreign:
            raise OutputError(
                f"{path} was not written by ssmc bench and is left alone. Move it, or name another folder."
            )
