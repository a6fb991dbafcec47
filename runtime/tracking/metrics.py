"""Figures out of records: every number of a nested record, under a name that every tracker takes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_UNUSUAL = re.compile(r"[^A-Za-z0-9_./ -]")


def numbers_in(record: Any, name: str = "") -> dict[str, float]:
    """The numbers of a record by the path to each, "modules/in_proj/error"; lists of numbers are counted, not listed.

    Args:
        record: of dictionaries, lists of dictionaries with a "name", and values.
        name: what to put before the paths.
    """
    if isinstance(record, bool) or record is None:
        return {}
    if isinstance(record, (int, float)):
        return {name: float(record)} if math.isfinite(record) else {}
    if isinstance(record, Mapping):
        return _joined(numbers_in(value, _path(name, key)) for key, value in record.items() if key != "name")
    if isinstance(record, (list, tuple)):
        named = [entry for entry in record if isinstance(entry, Mapping) and "name" in entry]
        if named:
            return _joined(numbers_in(entry, _path(name, entry["name"])) for entry in named)
        return {name: float(len(record))} if record and name else {}
    return {}


def _path(name: str, key: Any) -> str:
    key = _UNUSUAL.sub("_", str(key))
    return f"{name}/{key}" if name else key


def _joined(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        found |= part
    return found
