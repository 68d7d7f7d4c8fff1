"""MLflow's client: which server, how long to wait for it, and what all of our commands ask of it."""

from __future__ import annotations

import datetime
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import TrackingSection
from train.config.credentials import redact, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUEST_SECONDS = "20"  # MLflow's own default is two minutes, seven times in a row
HEARTBEAT_TAG = "heartbeat"  # unix seconds; from a training that lives, once a minute
DIED_TAG = "died"
DEAD_AFTER_SECONDS = 900.0
MAX_REASON_LENGTH = 200


class MlflowMissing(ValueError):
    """The package is not installed: waiting does not help."""

    def __init__(self) -> None:
        super().__init__("MLflow is not installed: pip install mlflow, or set tracking.mlflow=false")


def tracking_uri(config: TrackingSection, runs_folder: Path) -> str:
    """`tracking.uri`, or else SQLite in the folder of all runs (MLFLOW_TRACKING_URI wins over that).

    May hold a password: say it through `without_credentials`.
    """
    default = f"sqlite:///{(runs_folder / 'mlflow.db').resolve()}"
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def prepare_environment(num_retries: int = 2) -> None:
    """What MLflow reads from variables; in the main thread, before there are others that read them.

    Args:
        num_retries: by MLflow itself. 0 where a request must not be made twice: it repeats those, too, whose
            answer was lost.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_SECONDS)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password
    if num_retries == 0:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    else:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(num_retries))


def open_client(uri: str) -> MlflowClient:
    """A client of `uri`; nothing is asked of a server yet.

    Raises:
        MlflowMissing: MLflow is not installed.
    """
    prepare_environment()
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise MlflowMissing from None
    # A new SQLite file tells of every migration step, and a store that is down of its address and password.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri)


def open_experiment(client: MlflowClient, name: str, uri: str, runs_folder: Path) -> str:
    """Id of the experiment, made where it is not there yet."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    # With a database and no server, artifacts lie beside the database, and not where one happened to stand.
    local = uri.startswith("sqlite:")
    location = (runs_folder / "mlartifacts" / name).resolve().as_uri() if local else None
    return client.create_experiment(name, artifact_location=location)


def all_runs(client: MlflowClient, experiment_id: str, wanted: str) -> list[Run]:
    """Runs that a filter finds, those of all pages."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], wanted, max_results=500, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def mark_dead_runs(client: MlflowClient, experiment_id: str, own_run_id: str) -> list[str]:
    """Names of runs that claim to be running and gave no sign for 15 minutes; they are FAILED from now on.

    One that lives after all takes that back with its next sign.
    """
    marked = []
    for run in all_runs(client, experiment_id, "attributes.status = 'RUNNING'"):
        sign = _seconds(run.data.tags.get(HEARTBEAT_TAG))
        if run.info.run_id == own_run_id or sign is None or time.time() - sign < DEAD_AFTER_SECONDS:
            continue  # without a heartbeat, it is not one of ours
        client.set_tag(run.info.run_id, DIED_TAG, utc(sign))
        client.set_terminated(run.info.run_id, "FAILED", end_time=int(sign * 1000))
        marked.append(run.info.run_name)
    return marked


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def utc(seconds: float) -> str:
    """`2026-11-21T09:19:29+00:00`."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat()


def first_line(error: BaseException, uri: str | None = None) -> str:
    """An exception in a line, without secrets: the one that began it, as MLflow's own wraps half a page."""
    error = _root(error)
    lines = redact(str(error), uri).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:MAX_REASON_LENGTH]}"


def is_timeout(error: BaseException) -> bool:
    """Whether somebody was waited for in vain."""
    root = _root(error)
    return isinstance(root, TimeoutError) or "timed out" in str(root) or "timeout expired" in str(root)


def _root(error: BaseException) -> BaseException:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


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
        return f"MLflow at {without_credentials(uri)} did not take the report ({first_line(error, uri)})"
    return None
