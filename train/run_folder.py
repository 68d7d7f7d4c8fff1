"""`runs/<name>/`: which folder a training writes to, and whether it goes on with what is there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_prep.plain_json import read_json
from data_prep.storage import exclusive_lock, write_atomically
from train.checkpoint import CheckpointMirror, CheckpointStore
from train.config import CheckpointSection, Recipe, dump_recipe, flatten, parse_recipe
from train.fork import fork_run

RECIPE_NAME = "recipe.yaml"
STATUS_NAME = "status.json"
SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
MICRO_BATCH_NAME = "micro_batch.json"
MLFLOW_NAME = "mlflow.json"

LOCK_SECONDS = 40.0  # torchrun kills ranks that do not end 30 s after its SIGTERM

# What may differ when a run is taken up again: where and how it runs, never what it computes.
FREE_KEYS = (
    "expected",
    "run.",
    "data.path",
    "data.loader",
    "data.num_workers",
    "data.stage_folder",
    "data.check_bytes",
    "data.max_damaged_fraction",
    "data.timeout_seconds",
    "profile",
    "checkpoint.",
    "preemption.",
    "tracking.",
    "budget.",
)


def open_run_folder(recipe: Recipe, default_name: str, fork: bool = False) -> Path:
    """The folder of this training, made or found, with `recipe.yaml` in it; see the two parts of it."""
    folder = choose_run_folder(recipe, default_name, fork)
    begin_run_folder(folder, recipe)
    return folder


def choose_run_folder(recipe: Recipe, default_name: str, fork: bool = False) -> Path:
    """The folder of this training; made where it is new.

    An unfinished run of that name goes on. A finished one is left alone: with no `run.name` given, the next
    free `name-2` is taken.

    Args:
        fork: take a run of its own, `name-fork`, that goes on from the newest checkpoint of that name; one
            that was forked with this recipe before goes on itself.

    Raises:
        ValueError: the named run is finished.
    """
    name = recipe.run.name or default_name
    folder = recipe.run.folder / name
    if fork:
        folder = _forked(folder, recipe)
    number = 2
    while is_finished(folder):
        if recipe.run.name is not None:
            raise ValueError(
                f"run {name} in {recipe.run.folder} is finished: choose another run.name, or train on from "
                "its last checkpoint with another recipe: --fork"
            )
        folder = recipe.run.folder / f"{name}-{number}"
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def begin_run_folder(folder: Path, recipe: Recipe) -> None:
    """Write `recipe.yaml`, where it goes together with what is there.

    Raises:
        ValueError: the run was started with another recipe; names the differences.
    """
    differences = recipe_differences(folder, recipe)
    if differences and not has_checkpoint(folder):
        # It failed, or was stopped, before there was anything to go on with: this start is the first.
        (folder / MICRO_BATCH_NAME).unlink(missing_ok=True)
        (folder / MLFLOW_NAME).unlink(missing_ok=True)
        differences = []
    if differences:
        raise ValueError(
            f"run {folder.name} was started with another recipe ({'; '.join(differences[:5])}): choose "
            "another run.name, go back to that recipe, or go on from here under a name of its own: --fork"
        )
    (folder / STATUS_NAME).unlink(missing_ok=True)
    write_atomically(folder / RECIPE_NAME, dump_recipe(recipe).encode())


def restored_mirror(folder: Path, config: CheckpointSection) -> CheckpointMirror | None:
    """The mirror of this run, where there is one; what it has newer is brought to `folder` first.

    Raises:
        ValueError, RuntimeError: there is no checkpoint here, and the mirror's cannot be had.
    """
    if config.mirror is None:
        return None
    mirror = CheckpointMirror(f"{config.mirror.rstrip('/')}/{folder.name}")
    with contextlib.suppress(ValueError):  # nothing here is whole: the mirror may have it
        CheckpointStore(folder / "checkpoints").latest()  # unlists what is damaged
    mirror.restore(folder)  # says what it brought
    return mirror


def _forked(source: Path, recipe: Recipe) -> Path:
    """The fork of `source` with this recipe: the one that is there, or a new one."""
    number = 1
    while True:
        folder = source.with_name(f"{source.name}-fork{f'-{number}' if number > 1 else ''}")
        number += 1
        if not has_checkpoint(folder):
            fork_run(source, folder, METRICS_NAME)
            return folder
        if not is_finished(folder) and not recipe_differences(folder, recipe):
            return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this training.

    Under torchrun, which may just have been started again, the former training is given time to end: its
    ranks save when their launcher is gone.

    Raises:
        RuntimeError: another training holds it.
    """
    with exclusive_lock(folder, LOCK_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0):
        yield


def is_finished(folder: Path) -> bool:
    """Whether there is nothing to go on with; one that only spent its budget goes on with a larger one."""
    status = read_status(folder)
    return status.get("status") == "finished" and not str(status.get("reason")).endswith("budget")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run of this folder has something to go on with."""
    inside = folder / "checkpoints"
    return any(inside.glob("*.json")) or any(inside.glob("step-*.pt"))


def read_status(folder: Path) -> dict[str, Any]:
    """`status.json`, or an empty dict."""
    try:
        status = read_json(folder / STATUS_NAME)
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def write_status(folder: Path, status: Literal["finished", "restart", "failed"], reason: str) -> None:
    """Tell whoever launched this run what to do now; torchrun's exit code cannot.

    A disk that does not take it costs a warning: it must not hide why the run ended.
    """
    try:
        _write_status(folder, status, reason)
    except OSError as error:
        print(f"warning: {folder / STATUS_NAME} cannot be written ({error.strerror})", file=sys.stderr)


def _write_status(folder: Path, status: str, reason: str) -> None:
    content = {"status": status, "reason": reason}
    # A name of its own: ranks that fail for the same reason write at the same moment.
    own = folder / f".{STATUS_NAME}-{os.environ.get('RANK', '0')}"
    write_atomically(own, (json.dumps(content, indent=1) + "\n").encode())
    own.replace(folder / STATUS_NAME)


def recipe_differences(folder: Path, recipe: Recipe) -> list[str]:
    """`key: was 1, now 2` for all that decides the result; empty for a new folder."""
    path = folder / RECIPE_NAME
    if not path.is_file():
        return []
    try:
        former = parse_recipe(path.read_text(encoding="utf-8"))
    except ValueError:
        return [f"{path} cannot be read"]
    before, now = (flatten(r.model_dump(mode="json")) for r in (former, recipe))
    return [
        f"{key}: was {before.get(key)}, now {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ] + (
        []
        if former.run.seed == recipe.run.seed
        else [f"run.seed: was {former.run.seed}, now {recipe.run.seed}"]
    )
