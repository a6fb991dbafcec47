"""A latency table that the user gave in place of measuring one."""

from __future__ import annotations

from typing import Any

from ssmc.runtime.errors import UsageError


def require_same(path: str, *facts: tuple[str, Any, Any]) -> None:
    """Refuse a table that was measured for something else.

    Args:
        path: of the table.
        facts: what each is of, in words, what the table has, and what this run has.

    Raises:
        UsageError: they differ.
    """
    for what, has, wanted in facts:
        if has != wanted:
            raise UsageError(
                f"The latency table {path} is for {f'{what} {has}'.strip()}, this run is for {wanted}. Leave it out, "
                "and a new one is measured."
            )
