"""Weights & Biases, by its own client: as WANDB_MODE says, and offline where there is neither that nor a key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ssmc.runtime.tracking.tracker import PROJECT, RunInfo, Tracker


class WandbTracker(Tracker):
    """One run of the project WANDB_PROJECT, or "ssmc"."""

    name = "wandb"
    package = "wandb"

    def start(self, run: RunInfo) -> None:
        """Begin a run."""
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            job_type=run.command,
            config=dict(run.options),
            dir=str(run.folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="layer")

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Log figures; those of a layer against its number, those of the run in its summary."""
        if step is None:
            self._run.summary.update(dict(figures))
        else:
            self._run.log({**figures, "layer": step})

    def finish(self, failed: bool) -> str:
        """End the run."""
        where = self._run.dir if self._run.settings.mode == "offline" else self._run.url
        self._run.finish(exit_code=int(failed))
        return str(where)


TRACKER = WandbTracker
