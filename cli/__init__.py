"""The command line: `ssmc compress`, `ssmc export`, `ssmc bench`, `ssmc eval`. The only part of ssmc that prints.

Nothing here imports torch at start-up, so that help and shell completion answer at once.
"""

from .app import main

__all__ = ["main"]
