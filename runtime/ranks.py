"""Several processes at one piece of work, as `torchrun` starts them: which of them this is, without loading torch."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def ranks() -> int:
    """How many processes there are; 1 unless torchrun started them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0
