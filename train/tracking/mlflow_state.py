"""`runs/<name>/mlflow.json`: which MLflow run belongs to a training, and what it shall hold besides the rows.

The rows themselves are in metrics.jsonl, and which of them have arrived the server knows. So whatever dies,
what is missing can be sent later, and there is one run for a training over any number of starts.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.storage import write_atomically
from train.config.credentials import redact, without_credentials
from train.run_folder import MLFLOW_NAME
from train.tracking.mlflow_client import DIED_TAG

MAX_PARAMETER_LENGTH = 500
MAX_TAG_LENGTH = 4000
MAX_STATE_BYTES = 16 << 20
PARENT_TAG = "mlflow.parentRunId"  # MLflow shows such runs under their parent
KEY_PREFIX = "key:"


@dataclass
class Wanted:
    """What the server shall have.

    Attributes:
        uri: without credentials. key: a random number that the run is tagged with, so that it is found again
            where the answer to its creation was lost. run_id: once the server has told it.
        figures: `[name, value, step, milliseconds, was sent]`, numbers that stand in no row.
        files: name in the run's folder → `[artifact folder, size and time of what was sent]`.
        children: `[run name, tags]` for runs that have this one as their parent.
        status: `RUNNING`, and at the end `FINISHED`, `KILLED` or `FAILED`. is_complete: all of it was sent.
    """

    uri: str
    experiment: str
    run_name: str
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    run_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    figures: list[list[Any]] = field(default_factory=list)
    files: dict[str, list[Any]] = field(default_factory=dict)
    children: list[list[Any]] = field(default_factory=list)
    status: str = "RUNNING"
    ended: float | None = None  # unix seconds
    is_complete: bool = False


class MlflowState:
    """The file, shared by the training's thread, which wants things, and MLflow's, which sends them.

    A disk that refuses the file costs only what it is for: what is wanted stays in memory.
    """

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.folder = folder
        self.wanted = wanted
        self.lock = threading.RLock()  # held for moments only: the training waits for it
        self.fault: str | None = None
        self._written = ""
        self._write_lock = threading.Lock()

    def change_server(self, uri: str, experiment: str) -> None:
        """Another server or experiment than last time has nothing of this run yet."""
        uri = without_credentials(uri)
        with self.lock:
            if (self.wanted.uri, self.wanted.experiment) != (uri, experiment):
                self.wanted.uri, self.wanted.experiment = uri, experiment
                self.forget_run()

    def forget_run(self) -> None:
        """The server has no such run: all is to be sent again, to a new one."""
        with self.lock:
            self.wanted.run_id = None
            self.wanted.figures = [[*figure[:4], False] for figure in self.wanted.figures]
            self.wanted.files = {name: [entry[0], None] for name, entry in self.wanted.files.items()}

    def begin(self) -> None:
        """A start of the training: it runs, whatever was wanted before."""
        with self.lock:
            self.wanted.status, self.wanted.ended, self.wanted.is_complete = "RUNNING", None, False
            self.wanted.tags.pop(DIED_TAG, None)

    def end(self, status: str, ended: float | None = None) -> None:
        with self.lock:
            self.wanted.status, self.wanted.ended = status, ended or time.time()
            self.wanted.is_complete = False

    def add_parameters(self, parameters: dict[str, Any]) -> None:
        with self.lock:
            self.wanted.parameters |= {
                key: redact(str(value))[:MAX_PARAMETER_LENGTH] for key, value in parameters.items()
            }

    def add_tags(self, tags: dict[str, str]) -> None:
        with self.lock:
            self.wanted.tags |= {key: redact(value)[:MAX_TAG_LENGTH] for key, value in tags.items()}

    def add_figures(self, figures: dict[str, float], step: int) -> None:
        """One that is known with the same value and step is not sent a second time."""
        now = int(time.time() * 1000)
        with self.lock:
            for name, value in figures.items():
                former = [figure for figure in self.wanted.figures if (figure[0], figure[2]) == (name, step)]
                if not any(figure[1] == float(value) for figure in former):
                    self.wanted.figures.append([name, float(value), step, now, False])

    def add_file(self, path: Path, artifact_folder: str | None) -> None:
        """A file of the run's folder; sent again only where it has changed."""
        name = path.absolute().relative_to(self.folder.absolute()).as_posix()
        with self.lock:
            sent = self.wanted.files[name][1] if name in self.wanted.files else None
            self.wanted.files[name] = [artifact_folder, sent]

    def add_child(self, name: str, tags: dict[str, str]) -> None:
        with self.lock:
            self.wanted.children.append([name, tags])

    def save(self) -> None:
        """Write what has changed; durable on return, but for a disk that refuses (see `fault`)."""
        with self._write_lock:
            with self.lock:
                text = json.dumps({"version": 1, **asdict(self.wanted)}, indent=1) + "\n"
            if text == self._written:
                return
            try:
                write_atomically(self.folder / MLFLOW_NAME, text.encode())
                self._written = text
                self.fault = None
            except OSError as error:
                self.fault = f"{self.folder / MLFLOW_NAME} cannot be written ({error.strerror})"


def open_state(folder: Path, uri: str, experiment: str, reference: str | None = None) -> MlflowState:
    """The state that a run folder holds, or a new one.

    Args:
        reference: what a checkpoint remembers of the run (`reference_of`), where the folder lost its file.
    """
    wanted = load_wanted(folder)
    if wanted is None:
        wanted = Wanted(without_credentials(uri), experiment, folder.absolute().name)
        if reference is not None and reference.startswith(KEY_PREFIX):
            wanted.key = reference.removeprefix(KEY_PREFIX)
        else:
            wanted.run_id = reference
    state = MlflowState(folder, wanted)
    state.change_server(uri, experiment)
    return state


def reference_of(wanted: Wanted) -> str:
    """What finds the run again without the file: its id, or before there is one its key."""
    return wanted.run_id or KEY_PREFIX + wanted.key


def load_wanted(folder: Path) -> Wanted | None:
    """What `mlflow.json` holds; None where there is none, or none that can be read."""
    path = folder / MLFLOW_NAME
    try:
        if path.stat().st_size > MAX_STATE_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("version")
        wanted = Wanted(**content)
        texts = (wanted.uri, wanted.experiment, wanted.run_name, wanted.key, wanted.status)
        if not all(isinstance(text, str) for text in texts) or not wanted.key.isalnum():
            return None
        wanted.uri = without_credentials(wanted.uri)
        wanted.figures = [[str(f[0]), float(f[1]), int(f[2]), int(f[3]), bool(f[4])] for f in wanted.figures]
        wanted.files = {str(name): [entry[0], entry[1]] for name, entry in wanted.files.items()}
        wanted.children = [[str(name), dict(tags)] for name, tags in wanted.children]
        wanted.tags = {str(key): str(value) for key, value in wanted.tags.items()}
        wanted.parameters = {str(key): str(value) for key, value in wanted.parameters.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return wanted
