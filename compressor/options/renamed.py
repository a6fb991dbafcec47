"""Options that had another name in an earlier release: the old one is still read, with a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmc.runtime.errors import UsageError

RENAMED = {"target": "scope"}
"""Name in 0.1 -> name now. On the command line, in recipes, in Python and in the manifests of 0.1."""


def renamed(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options by their present names, and a sentence for each that came by an old one.

    Raises:
        UsageError: an option is given by both names.
    """
    found, notes = dict(options), []
    for old, new in RENAMED.items():
        if old not in found:
            continue
        value = found.pop(old)
        if found.get(new) is not None and value is not None:
            raise UsageError(f"{old} is the old name of {new}, and both are given. Give {new} only.")
        if value is not None:
            found[new] = value
            notes.append(f"The option {old} is now called {new}; the old name is still accepted.")
    return found, notes
