"""Bringing a run of an MLflow server up to what its folder holds; the server is the truth.

Nothing is remembered of it over a failure: the next attempt asks again what has arrived, and sends the rest.
So rows come once and in order, also where an answer was lost after the server had done its work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from train.run_folder import METRICS_NAME
from train.tracking.mlflow_client import (
    DIED_TAG,
    HEARTBEAT_TAG,
    all_runs,
    first_line,
    mark_dead_runs,
    open_client,
    open_experiment,
)
from train.tracking.mlflow_rows import KnownRows, RowFile
from train.tracking.mlflow_state import PARENT_TAG, MlflowState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HEARTBEAT_SECONDS = 60.0
KEY_TAG = "run_key"
MAX_FILE_FAILURES = 3
# What a server says of a request that it will refuse for ever.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")

Item = TypeVar("Item")


class RunDeleted(RuntimeError):
    """Somebody deleted the run: nothing is to be sent to it."""


@dataclass
class Sent:
    """What has arrived since the start of this process."""

    rows: int = 0
    parameters: int = 0
    tags: int = 0
    figures: int = 0
    files: int = 0


class Replay:
    """One run folder and its run on a server.

    Args:
        uri: with credentials, where it has some. is_live: a training is at work, so the run is RUNNING.
        say: takes warnings, a line each.
    """

    def __init__(
        self, state: MlflowState, uri: str, runs_folder: Path, is_live: bool, say: Callable[[str], None]
    ) -> None:
        self.state = state
        self.sent = Sent()
        self._uri = uri
        self._runs_folder = runs_folder
        self._is_live = is_live
        self._say = say
        self._rows = RowFile(state.folder / METRICS_NAME)
        self._client: MlflowClient | None = None
        self._known: KnownRows
        self._run: Run  # as it was when it was opened, and at each heartbeat
        self._experiment_id = ""
        self._next_heartbeat = 0.0
        self._is_doubtful = True  # a creation that was given up, now or by an earlier start, may yet be done
        self._has_looked_for_dead = False
        self._file_failures: dict[str, int] = {}
        self._refused: set[str] = set()

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def run_once(self) -> None:
        """Send all that is missing. Whatever MLflow raises comes out, and the next call begins anew."""
        try:
            client = self._client or self._open()
            self._client = client
            self._beat(client)
            self._send_rows(client)
            self._send_parameters_and_tags(client)
            self._send_figures(client)
            self._tag_children(client)
            self._send_status(client)
            self._send_files(client)
            self._mark_dead_runs(client)
        except BaseException:
            self._client = None
            raise
        finally:
            self.state.save()

    def _open(self) -> MlflowClient:
        """Find or create the run, and learn what it has."""
        wanted = self.state.wanted
        client = open_client(self._uri)
        self._experiment_id = open_experiment(client, wanted.experiment, self._uri, self._runs_folder)
        run = None if wanted.run_id is None else self._known_run(client, wanted.run_id)
        if run is None:
            run = self._find(client) or self._create(client)
        if run.info.lifecycle_stage == "deleted":
            raise RunDeleted(f"run {run.info.run_id} was deleted in MLflow")
        self._run = run
        with self.state.lock:
            wanted.run_id = run.info.run_id
            wanted.key = run.data.tags.get(KEY_TAG, wanted.key)  # of a folder that had lost its file
            wanted.tags[KEY_TAG] = wanted.key
        self.state.save()
        self._known = KnownRows(client, run.info.run_id)
        self._rows.rewind()
        self._next_heartbeat = 0.0
        return client

    def _known_run(self, client: MlflowClient, run_id: str) -> Run | None:
        """None where the server has lost it (another database, for example)."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        self._say(f"warning: MLflow has no run {run_id} any more: all rows go to a new one")
        self.state.forget_run()
        return None

    def _find(self, client: MlflowClient) -> Run | None:
        """The run with our key: created by an earlier start, or by a request whose answer was lost."""
        runs = all_runs(client, self._experiment_id, f"tags.{KEY_TAG} = '{self.state.wanted.key}'")
        runs.sort(key=lambda run: (run.info.start_time, run.info.run_id))
        for twin in runs[1:]:
            if not twin.data.metrics:
                client.delete_run(twin.info.run_id)
        return runs[0] if runs else None

    def _create(self, client: MlflowClient) -> Run:
        wanted = self.state.wanted
        now = time.time()
        tags = {KEY_TAG: wanted.key, HEARTBEAT_TAG: str(int(now))}
        if PARENT_TAG in wanted.tags:
            tags[PARENT_TAG] = wanted.tags[PARENT_TAG]
        began = min(now, self._rows.first_time() or now)
        self._is_doubtful = True
        return client.create_run(self._experiment_id, int(began * 1000), tags, wanted.run_name)

    def _beat(self, client: MlflowClient) -> None:
        """Once a minute: a sign of life, and the run as the server has it."""
        if not self._is_live or time.monotonic() < self._next_heartbeat:
            return
        run_id = self._run.info.run_id
        if self._next_heartbeat:
            self._run = client.get_run(run_id)
            if self._run.info.lifecycle_stage == "deleted":
                raise RunDeleted(f"run {run_id} was deleted in MLflow")
        client.set_tag(run_id, HEARTBEAT_TAG, str(int(time.time())))
        if self.state.wanted.status == "RUNNING":
            if self._run.info.status != "RUNNING":  # stopped before, or taken for dead while it was cut off
                client.update_run(run_id, status="RUNNING")
            if DIED_TAG in self._run.data.tags:
                client.delete_tag(run_id, DIED_TAG)
        if self._next_heartbeat:  # by now, a request that was given up has come to its end
            self._delete_twins(client)
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS

    def _delete_twins(self, client: MlflowClient) -> None:
        """Of a creation that the server did after we had given it up."""
        if not self._is_doubtful:
            return
        self._is_doubtful = False
        for run in all_runs(client, self._experiment_id, f"tags.{KEY_TAG} = '{self.state.wanted.key}'"):
            if run.info.run_id != self._run.info.run_id and not run.data.metrics:
                client.delete_run(run.info.run_id)

    def _send_rows(self, client: MlflowClient) -> None:
        run_id = self._run.info.run_id
        while rows := self._rows.read(self._known):
            self._offer(
                rows,
                lambda some: client.log_batch(run_id, metrics=[m for row in some for m in row.as_metrics()]),
                lambda row: f"the row of step {row.step}",
            )
            self._known.add(rows)
            self._rows.advance()
            self.sent.rows += len(rows)
        self._rows.advance()

    def _send_parameters_and_tags(self, client: MlflowClient) -> None:
        from mlflow.entities import Param, RunTag

        run_id, data = self._run.info.run_id, self._run.data
        with self.state.lock:
            parameters = dict(self.state.wanted.parameters)
            tags = dict(self.state.wanted.tags)
        # MLflow never changes a parameter: what the first start said stands.
        missing = [Param(key, value) for key, value in parameters.items() if key not in data.params]
        for start in range(0, len(missing), 100):
            self._offer(
                missing[start : start + 100],
                lambda some: client.log_batch(run_id, params=some),
                lambda parameter: f"the parameter {parameter.key}",
            )
        changed = [RunTag(key, value) for key, value in tags.items() if data.tags.get(key) != value]
        for start in range(0, len(changed), 100):
            self._offer(
                changed[start : start + 100],
                lambda some: client.log_batch(run_id, tags=some),
                lambda tag: f"the tag {tag.key}",
            )
        data.params.update({parameter.key: parameter.value for parameter in missing})
        data.tags.update({tag.key: tag.value for tag in changed})
        self.sent.parameters += len(missing)
        self.sent.tags += len(changed)

    def _send_figures(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        with self.state.lock:
            figures = [figure for figure in self.state.wanted.figures if not figure[4]]
        if not figures:
            return
        # A store drops what it has with the same time, step and value: these may be sent again.
        self._offer(
            figures,
            lambda some: client.log_batch(
                self._run.info.run_id, metrics=[Metric(f[0], f[1], f[3], f[2]) for f in some]
            ),
            lambda figure: f"the metric {figure[0]}",
        )
        with self.state.lock:
            for figure in figures:
                figure[4] = True
        self.sent.figures += len(figures)

    def _tag_children(self, client: MlflowClient) -> None:
        with self.state.lock:
            children = list(self.state.wanted.children)
        for child in children:
            name, tags = child
            quoted = name.replace("'", "")
            wanted = f"tags.`{PARENT_TAG}` = '{self._run.info.run_id}' and attributes.run_name = '{quoted}'"
            for run in all_runs(client, self._experiment_id, wanted):
                for key, value in tags.items():
                    client.set_tag(run.info.run_id, key, value)
            with self.state.lock:
                self.state.wanted.children.remove(child)

    def _send_status(self, client: MlflowClient) -> None:
        """Before the files: they may be large, and the run has ended whether they arrive or not."""
        wanted = self.state.wanted
        if wanted.status == "RUNNING" or wanted.is_complete:
            return
        self._delete_twins(client)
        if DIED_TAG in self._run.data.tags and DIED_TAG not in wanted.tags:
            client.delete_tag(self._run.info.run_id, DIED_TAG)
            del self._run.data.tags[DIED_TAG]
        ended = int((wanted.ended or time.time()) * 1000)
        client.set_terminated(self._run.info.run_id, wanted.status, end_time=ended)

    def _send_files(self, client: MlflowClient) -> None:
        with self.state.lock:
            files = {name: list(entry) for name, entry in self.state.wanted.files.items()}
        for name, (artifact_folder, sent) in files.items():
            path = self.state.folder / name
            version = _version(path, self.state.folder)
            failures = self._file_failures.get(name, 0)
            if version is None or version == sent or failures == MAX_FILE_FAILURES:
                continue
            try:
                client.log_artifact(self._run.info.run_id, str(path), artifact_folder)
            except Exception as error:
                self._file_failures[name] = failures + 1
                if failures + 1 == MAX_FILE_FAILURES:  # rows are worth more: they go on without it
                    self._say(f"warning: MLflow does not take {name} ({first_line(error, self._uri)})")
                raise
            with self.state.lock:
                self.state.wanted.files[name] = [artifact_folder, version]
            self.state.save()
            self.sent.files += 1
        with self.state.lock:
            wanted = self.state.wanted
            wanted.is_complete = wanted.status != "RUNNING" and not self.unsent_bytes()

    def unsent_bytes(self) -> int:
        """Of files that the server does not have."""
        with self.state.lock:
            files = {name: entry[1] for name, entry in self.state.wanted.files.items()}
        versions = {name: _version(self.state.folder / name, self.state.folder) for name in files}
        return sum(v[0] for name, v in versions.items() if v is not None and v != files[name])

    def _mark_dead_runs(self, client: MlflowClient) -> None:
        if self._has_looked_for_dead:
            return
        self._has_looked_for_dead = True
        with contextlib.suppress(Exception):  # somebody else's runs: never a reason to try ours again
            if dead := mark_dead_runs(client, self._experiment_id, self._run.info.run_id):
                self._say(f"MLflow: {', '.join(dead)} died some time ago, and are marked as failed")

    def _offer(
        self, items: list[Item], send: Callable[[list[Item]], Any], name: Callable[[Item], str]
    ) -> None:
        """All at once; where the server refuses them, one by one, without those that it will never take."""
        from mlflow.exceptions import MlflowException

        if not items:
            return
        try:
            send(items)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            client = open_client(self._uri)
            if client.get_run(self._run.info.run_id).info.lifecycle_stage == "deleted":
                raise RunDeleted(f"run {self._run.info.run_id} was deleted in MLflow") from None
            if len(items) > 1:
                for item in items:
                    self._offer([item], send, name)
            elif name(items[0]) not in self._refused:
                self._refused.add(name(items[0]))
                reason = first_line(error, self._uri)
                self._say(f"warning: MLflow refuses {name(items[0])} ({reason}); it is left out")


def _version(path: Path, folder: Path) -> list[int] | None:
    """Size and time of a file inside the run's folder; None for one that is gone or lies elsewhere."""
    try:
        # A folder may come from somebody else, and must not make us publish other files.
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return None
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
