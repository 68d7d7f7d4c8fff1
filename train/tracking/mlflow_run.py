"""One MLflow run for one training, kept up to date by a thread of its own.

metrics.jsonl is the spool: the training appends a row and calls `poke`; the thread sends what the server
does not have. A server that is down, hangs or answers nonsense costs neither the run nor its speed: the
thread tries again until the end, and `python -m train sync RUN_FOLDER` sends what is missing then.

Example:
    >>> mlflow = MlflowRun(recipe.tracking, folder, say=console.say)
    >>> metrics.append(row)
    >>> mlflow.poke()
    >>> mlflow.finish("FINISHED")
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import TrackingSection
from train.config.credentials import without_credentials
from train.tracking.mlflow_client import (
    MlflowMissing,
    first_line,
    is_timeout,
    prepare_environment,
    tracking_uri,
)
from train.tracking.mlflow_replay import HEARTBEAT_SECONDS, Replay, RunDeleted
from train.tracking.mlflow_state import PARENT_TAG, open_state, reference_of

FINISH_SECONDS = 60.0
STOP_SECONDS = 5.0  # a planned stop has other things to do in its 30 s
OPEN_SECONDS = 60.0
UPLOAD_BYTES_PER_SECOND = 4e6  # the end waits so much longer for files
PAUSE_SECONDS = 1.0  # between two requests, however often rows come
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0
MAX_LAST_FAILURES = 3  # at the end; then the server is taken for gone
LAST_WAIT_SECONDS = 1.0  # times the failures so far
HANGING_SECONDS = 10.0  # the end waits no longer for a server that hung at the last attempt


class MlflowRun:
    """A run of the tracking server; every method but `finish` and `wait_until_open` returns at once.

    Args:
        folder: of the run, with metrics.jsonl; its name is the run's. With neither `tracking.uri` nor
            MLFLOW_TRACKING_URI, the store is a database beside it.
        reference: what a checkpoint remembers of the run (`MlflowRun.reference`), or a run id, or None. Where
            `mlflow.json` is in the folder, that counts.
        say: takes what is to be said, without any password.
    """

    def __init__(
        self,
        config: TrackingSection,
        folder: Path,
        reference: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        prepare_environment(num_retries=0)  # we do that, and never twice
        uri = tracking_uri(config, folder.parent)
        self.uri = without_credentials(uri)
        self.failed: str | None = None  # why the last attempt failed; None while all is well
        self._secret_uri = uri
        self._folder = folder
        self._say_line = say
        self._state = open_state(folder, uri, config.experiment, reference)
        self._state.begin()
        if config.parent_run_id is not None:
            self._state.add_tags({PARENT_TAG: config.parent_run_id})
        self._save()  # the key is on the disk before a run can be created with it
        self._replay = Replay(self._state, uri, folder.parent, is_live=True, say=self._say)
        self._poked, self._ending, self._answered, self._done = (threading.Event() for _ in range(4))
        self._is_silent = False
        self._hangs = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread is left for us: the training goes on without MLflow
            self._work(error)

    @property
    def run_id(self) -> str | None:
        """None until the server has told it."""
        return self._state.wanted.run_id

    @property
    def reference(self) -> str:
        """For the checkpoint: finds the run again on a machine that has nothing else."""
        return reference_of(self._state.wanted)

    def poke(self) -> None:
        """There is a new row in metrics.jsonl."""
        self._poked.set()

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        self._state.add_parameters(parameters)
        self.poke()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Numbers that stand in no row of metrics.jsonl."""
        self._state.add_figures(metrics, step)
        self.poke()

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file inside the run's folder, under `folder` in MLflow."""
        try:
            self._state.add_file(path, folder)
        except ValueError:
            self._say(f"warning: {path} does not go to MLflow: it is not in {self._folder}")
        self.poke()

    def set_tags(self, tags: dict[str, str]) -> None:
        self._state.add_tags(tags)
        self.poke()

    def tag_child(self, name: str, tags: dict[str, str]) -> None:
        """Tag the runs called `name` that have this one as their parent."""
        self._state.add_child(name, tags)
        self.poke()

    def wait_until_open(self, timeout_seconds: float = OPEN_SECONDS) -> str | None:
        """The run's id once the server knows it; None where the first attempt fails, or takes too long."""
        self._answered.wait(timeout_seconds)
        return self.run_id if self._replay.is_open else None

    def finish(self, status: str, timeout_seconds: float | None = None) -> bool:
        """Send what is left and mark the run; gives up early where the server does not answer.

        Args:
            status: `FINISHED`, `KILLED` or `FAILED`.
            timeout_seconds: at most; default: a minute, and more where there are large files to send.

        Returns:
            Whether all has arrived. If not, that was said, with the command that sends the rest.
        """
        if self._ending.is_set():
            return self._state.wanted.is_complete
        if timeout_seconds is None:
            timeout_seconds = FINISH_SECONDS + self._replay.unsent_bytes() / UPLOAD_BYTES_PER_SECOND
        if self._hangs:
            timeout_seconds = min(timeout_seconds, HANGING_SECONDS)
        self._state.end(status)
        self._save()
        self._ending.set()
        self._poked.set()
        self._done.wait(timeout_seconds)
        if not self._state.wanted.is_complete:
            reason = f" ({self.failed})" if self.failed else ""
            self._say(
                f"warning: MLflow at {self.uri} did not get everything{reason}; "
                f"`python -m train sync {self._folder}` sends the rest later"
            )
            self._is_silent = True  # the thread may yet come to its end, after our last word
        return self._state.wanted.is_complete

    def _work(self, fault: Exception | None = None) -> None:
        try:
            if fault is not None:
                raise fault
            self._send_until_the_end()
        except Exception as error:  # whatever it is, the training goes on without MLflow
            self.failed = first_line(error, self._secret_uri)
            self._say(
                f"warning: no row goes to MLflow at {self.uri} any more: {_sentence(error, self.failed)}"
            )
        finally:
            self._answered.set()
            self._done.set()

    def _send_until_the_end(self) -> None:
        backoff, num_last_failures, num_sent = FIRST_BACKOFF_SECONDS, 0, 0
        while True:
            self._poked.clear()
            is_ending = self._ending.is_set()  # before the attempt: it must have seen what was wanted last
            try:
                self._replay.run_once()
            except (MlflowMissing, RunDeleted):
                raise
            except Exception as error:  # MLflow raises all kinds
                if self.failed is None:
                    self._say(
                        f"warning: MLflow at {self.uri} failed ({first_line(error, self._secret_uri)}); "
                        "metrics.jsonl keeps every row, and they are sent when it is back"
                    )
                self.failed = first_line(error, self._secret_uri)
                self._answered.set()
                self._hangs = is_timeout(error)
                if is_ending:
                    num_last_failures += MAX_LAST_FAILURES if self._hangs else 1
                    if num_last_failures >= MAX_LAST_FAILURES:
                        return
                    time.sleep(LAST_WAIT_SECONDS * num_last_failures)
                else:
                    self._ending.wait(backoff)
                    backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                continue
            if self.failed is not None:
                self._say(f"MLflow is back: {self._replay.sent.rows - num_sent} rows sent")
            self.failed, self._hangs, backoff = None, False, FIRST_BACKOFF_SECONDS
            num_sent = self._replay.sent.rows
            self._answered.set()
            if is_ending:
                return
            self._poked.wait(HEARTBEAT_SECONDS)
            self._ending.wait(PAUSE_SECONDS)  # what comes meanwhile goes out together

    def _save(self) -> None:
        self._state.save()
        if self._state.fault is not None:
            self._say(f"warning: {self._state.fault}: after a crash, MLflow may miss something")

    def _say(self, line: str) -> None:
        if not self._is_silent:
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                self._say_line(line)


def _sentence(error: Exception, line: str) -> str:
    return str(error) if isinstance(error, MlflowMissing | RunDeleted) else line
