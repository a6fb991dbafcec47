"""Turn what `compress` wrote into checkpoints that others load, and prove that they compute the same."""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.exporters.pipeline": "ExportResult export",
        "ssmc.exporters.format": "Format Job Proof Table option",
        "ssmc.exporters.registry": "all_formats format_named missing_formats register_format",
        "ssmc.exporters.runtimes": "Runtime runs_where",
        "ssmc.exporters.cutting": "Shrunk shrink",
        "ssmc.exporters.verify": "Comparison compare",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
