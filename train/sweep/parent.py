"""The sweep in MLflow: a run of its own, under which its trials appear. Without MLflow, nothing is missed.

A cross-validation (`evaluation.kfold`) is another parent, of its folds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.config import TrackingSection
from train.tracking.mlflow_client import tracking_uri
from train.tracking.mlflow_run import MlflowRun

OPEN_SECONDS = 120.0  # for a slow one; where it is down, that is known at once


class ParentRun:
    """The sweep's MLflow run, or nothing where tracking is off.

    With a server that is down at the start, the trials stand alone until it is back.

    Args:
        folder: of the sweep. run_id: of an earlier start of the same sweep, for a folder without mlflow.json.
    """

    def __init__(
        self,
        config: TrackingSection,
        folder: Path,
        run_id: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.environment: dict[str, str] = {}  # for the trials: the same store
        self._run: MlflowRun | None = None
        if not config.mlflow:
            return
        # Their run.folder is another one, and without a word they would make a store there.
        self.environment = {"MLFLOW_TRACKING_URI": tracking_uri(config, folder.parent)}
        self._run = MlflowRun(config, folder, run_id, say)
        self._run.wait_until_open(OPEN_SECONDS)

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else self._run.run_id

    def describe(self, parameters: dict[str, str], tags: dict[str, str]) -> None:
        if self._run is not None:
            self._run.log_parameters(parameters)
            self._run.set_tags({"kind": "sweep", **tags})

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log_metrics(figures, step)

    def trial_ended(self, name: str, state: str, best: dict[str, float], number: int) -> None:
        """Mark a trial's own run, and note the best so far."""
        if self._run is not None:
            self._run.tag_child(name, {"sweep.state": state, "sweep.trial": str(number)})
            if best:
                self._run.log_metrics(best, number)

    def finish(self, status: str, tags: dict[str, str], files: list[Path]) -> None:
        """Complete the run: `FINISHED`, `KILLED` (to be taken up again) or `FAILED`."""
        if self._run is None:
            return
        self._run.set_tags(tags)
        for path in files:
            if path.is_file():
                self._run.log_file(path)
        self._run.finish(status)
