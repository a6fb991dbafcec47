"""Publish an export on the Hugging Face hub: which files, with which model card."""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes({"ssmc.exporters.hub.upload": "Pushed push", "ssmc.exporters.hub.card": "Facts make_card"})
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
