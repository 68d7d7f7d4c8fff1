"""`python -m train follow s3://bucket/runs/mine runs-here/mine`: MLflow on this machine, of a run elsewhere.

Reads what the run's mirror has (recipe, metrics.jsonl), as new as its last checkpoint, and sends it to MLflow
as the training itself would have done: every row once, with its own time. By default that is SQLite beside
the folder, `runs-here/mlflow.db`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.storage import exclusive_lock, open_folder, write_atomically
from train.checkpoint.fetch import read_latest
from train.config import RecipeError, TrackingSection, flatten, load_recipe
from train.config.credentials import redact, without_credentials
from train.run_folder import METRICS_NAME, MLFLOW_NAME, RECIPE_NAME
from train.tracking.mlflow_client import MlflowMissing, first_line, prepare_environment, tracking_uri
from train.tracking.mlflow_replay import Replay, RunDeleted
from train.tracking.mlflow_state import open_state

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

FILES = (RECIPE_NAME, METRICS_NAME, MLFLOW_NAME)
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train follow", description="send MLflow on this machine the rows of a run in S3"
    )
    parser.add_argument("mirror", help="s3://bucket/prefix/run-name, as in checkpoint.mirror")
    parser.add_argument("folder", type=Path, help="where its files are kept here; its parent holds mlflow.db")
    parser.add_argument("--uri", help="MLflow tracking URI (default: SQLite beside the folder)")
    parser.add_argument("--live", help="where its files are newer than in the mirror")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="look once, and end")
    parser.add_argument("--end", choices=ENDS, help="with --once: the run has ended, and how")
    options = parser.parse_args(arguments)
    prepare_environment(num_retries=0)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(options.folder):
            follower = Follower(options.mirror, options.folder, options.uri, options.live)
            if options.once:
                print(follower.look(options.end))
                return 0
            return _follow(follower, options.every)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {redact(str(error), options.uri)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _follow(follower: Follower, every_seconds: float) -> int:
    said = ""
    while True:
        try:
            sentence = follower.look()
        except (RuntimeError, OSError) as error:  # the network of a laptop: it comes back
            sentence = f"warning: {error}"
        if sentence != said:
            print(sentence, flush=True)
            said = sentence
        time.sleep(every_seconds)


class Follower:
    """A run in S3 and its copy in MLflow; `look` brings the second up to the first."""

    def __init__(self, mirror: str, folder: Path, uri: str | None = None, live: str | None = None) -> None:
        self._live = None if live is None else open_folder(live)
        self._s3: S3Folder = open_folder(mirror)  # type: ignore[assignment]
        self._folder, self._wanted_uri = folder, uri
        self._have: dict[str, str] = {}  # name → SHA-256 of what was brought
        self._replay: Replay | None = None
        self._num_rows = 0

    def look(self, end: str | None = None) -> str:
        """Bring what is new, and send it; a sentence of what there is now.

        Raises:
            ValueError: the mirror cannot be used, MLflow is missing, or its run was deleted.
            RuntimeError: S3 or MLflow does not answer.
        """
        if not self._bring_live() and not self._bring_mirrored():
            return f"{self._s3.location} has nothing yet: it is filled from the run's first epoch on"
        replay = self._replay or self._open()
        self._replay = replay
        if end is not None:
            replay.state.end(ENDS[end])
        try:
            replay.run_once()
        except (MlflowMissing, RunDeleted) as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # MLflow raises all kinds
            raise RuntimeError(f"MLflow at {self._shown} failed ({first_line(error, self._uri)})") from None
        self._num_rows += replay.sent.rows
        replay.sent.rows = 0
        wanted = replay.state.wanted
        return (
            f"sent {self._num_rows:,} rows of {wanted.run_name} to {self._shown}; the run is {wanted.status}"
        )

    def _bring_live(self) -> bool:
        """From the copy that is newer than the mirror; whether there is one with rows and recipe."""
        if self._live is None:
            return False
        there = {file.name: file for file in self._live.children()}
        if not {METRICS_NAME, RECIPE_NAME} <= set(there):
            return False
        for name in FILES:
            if name in there and self._is_wanted(name, there[name].version):
                write_atomically(self._folder / name, self._live.read(name))
                self._have[name] = there[name].version
        return True

    def _bring_mirrored(self) -> bool:
        latest = read_latest(self._s3)
        if latest is None or not latest.files:
            return False
        for file in latest.files:
            if not self._is_wanted(file.name, file.sha256):
                continue
            content = self._s3.read(file.key)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise RuntimeError(f"{file.key} arrived with other bytes than were written: trying again")
            write_atomically(self._folder / file.name, content)
            self._have[file.name] = file.sha256
        return True

    def _is_wanted(self, name: str, version: str) -> bool:
        if name == MLFLOW_NAME and (self._folder / name).is_file():
            return False  # ours, by now: it says what was sent to this MLflow
        return name in FILES and self._have.get(name) != version

    def _open(self) -> Replay:
        try:
            recipe = load_recipe(self._folder / RECIPE_NAME)
        except RecipeError:  # of another version
            recipe = None
        # The run's own server is not reached from here: its recipe's address counts for its machine.
        self._uri = self._wanted_uri or tracking_uri(TrackingSection(), self._folder.absolute().parent)
        self._shown = without_credentials(self._uri)
        experiment = TrackingSection().experiment if recipe is None else recipe.tracking.experiment
        state = open_state(self._folder, self._uri, experiment)
        state.wanted.files.clear()  # its pictures stay where they were made
        state.begin()
        if recipe is not None and not state.wanted.parameters:
            state.add_parameters(flatten(recipe.model_dump(mode="json")))
            state.add_tags({"dataset": recipe.data.name})
        state.save()
        runs_folder = self._folder.absolute().parent
        return Replay(state, self._uri, runs_folder, is_live=True, say=lambda line: print(line, flush=True))
