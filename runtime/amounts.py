"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from ssmc.runtime.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(written: str | int, option: str) -> int:
    """Bytes from "8GiB", "500 MB" or a number of bytes.

    Args:
        written: by the user.
        option: what to call it in the error.

    Raises:
        UsageError: it is no amount.
    """
    match = _WRITTEN.fullmatch(str(written))
    if match is None or not float(match[1]):
        raise UsageError(f"{option} {written!r} is no amount of memory. Write it like 8GiB or 500MB.")
    return round(float(match[1]) * _UNITS[(match[2] or "").lower()])


def in_mib(nbytes: float) -> str:
    """Bytes for people, in whole MiB, rounded up."""
    return f"{-(-int(nbytes) // 2**20)}MiB"
