"""One MLflow run for one training, written by a thread of its own.

A tracking server that is down must cost neither the run nor its speed: calls wait in a queue, the thread
makes them, and the first failure is said once. What it could not send stays in metrics.jsonl.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import TrackingSection

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAMETER_LENGTH = 500
PARENT_TAG = "mlflow.parentRunId"  # MLflow shows such runs under their parent
FINISH_SECONDS = 120.0
MOST_FAILURES = 3  # in a row; then the server is taken for gone


def tracking_uri(config: TrackingSection, runs_folder: Path) -> str:
    """`tracking.uri`, or else SQLite in the folder of all runs (MLFLOW_TRACKING_URI wins over that)."""
    default = f"sqlite:///{(runs_folder / 'mlflow.db').resolve()}"
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def open_client(uri: str) -> MlflowClient:
    """A client of `uri` that gives up after some seconds (MLflow's own default is many minutes).

    Raises:
        ValueError: MLflow is not installed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise ValueError(
            "MLflow is not installed: pip install mlflow, or set tracking.mlflow=false"
        ) from None
    _quiet_logging()
    return MlflowClient(tracking_uri=uri)


def _quiet_logging() -> None:
    import logging

    # The store tells of every migration step of a new SQLite file.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def open_experiment(client: MlflowClient, name: str, uri: str, runs_folder: Path) -> str:
    """Id of the experiment, made where it is not there yet."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    # With a database and no server, artifacts lie beside the database, and not where one happened to stand.
    local = uri.startswith("sqlite:")
    location = (runs_folder / "mlartifacts" / name).resolve().as_uri() if local else None
    return client.create_experiment(name, artifact_location=location)


class MlflowRun:
    """A run of the tracking server; every method returns at once.

    Args:
        run_id: of the run to go on with, or None for a new one.
        on_run_id: called in the thread with the id, as soon as there is one.
    """

    def __init__(
        self,
        config: TrackingSection,
        runs_folder: Path,
        run_name: str,
        run_id: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.uri = tracking_uri(config, runs_folder)
        self.run_id = run_id
        self.failed: str | None = None
        self._say = say
        self._calls: queue.Queue[Callable[[MlflowClient, str], None] | None] = queue.Queue()
        self._client: MlflowClient | None = None
        self._opened = threading.Event()  # or failed
        self._thread = threading.Thread(
            target=self._work, args=(config, runs_folder, run_name), name="mlflow", daemon=True
        )
        self._thread.start()

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        from_plain = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in parameters.items()}

        def call(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Param

            known = client.get_run(run_id).data.params
            new = [Param(key, value) for key, value in from_plain.items() if key not in known]
            for start in range(0, len(new), 100):
                client.log_batch(run_id, params=new[start : start + 100])

        self._calls.put(call)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        timestamp = int(time.time() * 1000)

        def call(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Metric

            rows = [Metric(key, float(value), timestamp, step) for key, value in metrics.items()]
            client.log_batch(run_id, metrics=rows)

        self._calls.put(call)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._calls.put(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    def set_tags(self, tags: dict[str, str]) -> None:
        def call(client: MlflowClient, run_id: str) -> None:
            for key, value in tags.items():
                client.set_tag(run_id, key, value)

        self._calls.put(call)

    def tag_child(self, name: str, tags: dict[str, str]) -> None:
        """Tag the runs called `name` that have this one as their parent."""

        def call(client: MlflowClient, run_id: str) -> None:
            experiment_id = client.get_run(run_id).info.experiment_id
            wanted = f"tags.`{PARENT_TAG}` = '{run_id}' and attributes.run_name = '{name}'"
            for child in client.search_runs([experiment_id], wanted):
                for key, value in tags.items():
                    client.set_tag(child.info.run_id, key, value)

        self._calls.put(call)

    def wait_until_open(self, timeout_seconds: float = FINISH_SECONDS) -> str | None:
        """The run's id once the server knows it; None where it does not answer."""
        self._opened.wait(timeout_seconds)
        return self.run_id if self._client is not None and self.failed is None else None

    def finish(self, status: str) -> None:
        """Send what is left and mark the run (`FINISHED`, `KILLED` or `FAILED`); waits, but not for ever."""
        self._calls.put(lambda client, run_id: client.set_terminated(run_id, status))
        self._calls.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say(f"warning: MLflow at {self.uri} does not answer; the rows are in metrics.jsonl")

    def _work(self, config: TrackingSection, runs_folder: Path, run_name: str) -> None:
        try:
            self._open(config, runs_folder, run_name)
            self._opened.set()
            failures = 0
            while (call := self._calls.get()) is not None:
                assert self._client is not None and self.run_id is not None
                try:
                    call(self._client, self.run_id)
                    failures = 0
                except Exception as error:
                    failures += 1
                    if failures == MOST_FAILURES:
                        raise
                    self._say(f"warning: MLflow at {self.uri} missed something ({_first_line(error)})")
        except Exception as error:  # whatever MLflow raises, training goes on without it
            self.failed = _first_line(error)
            self._opened.set()
            self._say(f"warning: MLflow at {self.uri} failed ({self.failed}); metrics.jsonl has every row")

    def _open(self, config: TrackingSection, runs_folder: Path, run_name: str) -> None:
        client = open_client(self.uri)
        if self.run_id is None:
            experiment_id = open_experiment(client, config.experiment, self.uri, runs_folder)
            tags = {PARENT_TAG: config.parent_run_id} if config.parent_run_id else {}
            self.run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
        self._client = client


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def add_to_run(
    uri: str, run_id: str, folder: Path, artifact_folder: str, metrics: dict[str, float]
) -> str | None:
    """Add a folder's files and some figures to a run that has ended; a sentence where that failed."""
    try:
        client = open_client(uri)
        client.log_artifacts(run_id, str(folder), artifact_folder)
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
    except Exception as error:  # whatever MLflow raises, the files are there
        return f"MLflow at {uri} did not take the report ({_first_line(error)})"
    return None
