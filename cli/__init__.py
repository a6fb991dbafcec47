"""The command line: `ssmc compress`, `export`, `bench`, `eval`, `generate`. The only part of ssmc that prints.

Nothing here imports torch at start-up, so that help and shell completion answer at once.
"""

from ssmc.cli.app import main

__all__ = ["main"]
