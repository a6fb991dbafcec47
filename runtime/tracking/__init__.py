"""Log what a run measures to the place where somebody keeps such things: mlflow, wandb, trackio, or a CSV file.

A tracker is one file in `trackers/`, imported when it is asked for; `register_tracker` adds one from outside, an
installed package does so by an entry point of the group `ssmc.trackers`.
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.tracking.tracker": "RunInfo Tracker make_tracker register_tracker tracker_names",
        "ssmc.runtime.tracking.run": "Tracking tracked",
        "ssmc.runtime.tracking.metrics": "numbers_in",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
