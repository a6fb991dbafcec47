"""mlflow, by its own client: to MLFLOW_TRACKING_URI where that is set, else to a file of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ssmc.runtime.tracking.tracker import PROJECT, RunInfo, Tracker

_LONGEST = 500  # characters of a parameter that every server takes


class MlflowTracker(Tracker):
    """One run of the experiment MLFLOW_EXPERIMENT_NAME, or "ssmc"."""

    name = "mlflow"
    package = "mlflow"

    def start(self, run: RunInfo) -> None:
        """Begin a run."""
        import mlflow

        self._mlflow: Any = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            run.folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # plain files, which need no database
            mlflow.set_tracking_uri((run.folder / "mlruns").resolve().as_uri())
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=run.name)
        mlflow.set_tag("command", run.command)
        mlflow.log_params({name: str(value)[:_LONGEST] for name, value in run.options.items()})

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Log figures; mlflow's names may have no brackets, which ours have not."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def finish(self, failed: bool) -> str:
        """End the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")
        return str(self._mlflow.get_tracking_uri())


TRACKER = MlflowTracker
