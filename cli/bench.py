"""`ssmc bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import CompressedDirectory, Quiet, Verbose
from .terminal import Terminal


def bench(
    context: typer.Context,
    directory: CompressedDirectory = Path("ssmc-out"),
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure the dense model beside the compressed one.

    Writes `bench.json` and the self-contained page `bench.html` into the folder.
    """
    terminal = context.ensure_object(Terminal)
    from ssmc.runtime.bench import benchmark

    terminal.hush_libraries()
    with terminal.progress() as progress:
        report = benchmark(directory, progress=progress)
    report.write(directory)
