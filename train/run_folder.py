"""`runs/<name>/`: which folder a training writes to, and whether it goes on with what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from data_prep.storage import write_atomically
from train.config import Recipe, dump_recipe, flatten

RECIPE_NAME = "recipe.yaml"
STATUS_NAME = "status.json"
SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
MICRO_BATCH_NAME = "micro_batch.json"
MLFLOW_NAME = "mlflow.json"

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


def open_run_folder(recipe: Recipe, default_name: str) -> Path:
    """The folder of this training, made or found, with `recipe.yaml` in it.

    An unfinished run of that name goes on. A finished one is left alone: with no `run.name` given, the next
    free `name-2` is taken.

    Raises:
        ValueError: the named run is finished, or was started with another recipe; names the differences.
    """
    name = recipe.run.name or default_name
    folder = recipe.run.folder / name
    number = 2
    while is_finished(folder):
        if recipe.run.name is not None:
            raise ValueError(f"run {name} in {recipe.run.folder} is finished: choose another run.name")
        folder = recipe.run.folder / f"{name}-{number}"
        number += 1
    differences = recipe_differences(folder, recipe)
    if differences and not has_checkpoint(folder):
        # It failed, or was stopped, before there was anything to go on with: this start is the first.
        (folder / MICRO_BATCH_NAME).unlink(missing_ok=True)
        (folder / MLFLOW_NAME).unlink(missing_ok=True)
        differences = []
    if differences:
        raise ValueError(
            f"run {folder.name} was started with another recipe ({'; '.join(differences[:5])}): choose "
            "another run.name, or go back to that recipe"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS_NAME).unlink(missing_ok=True)
    write_atomically(folder / RECIPE_NAME, dump_recipe(recipe).encode())
    return folder


def is_finished(folder: Path) -> bool:
    """Whether there is nothing to go on with; one that only spent its budget goes on with a larger one."""
    status = read_status(folder)
    return status.get("status") == "finished" and not str(status.get("reason")).endswith("budget")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run of this folder has something to go on with."""
    return any((folder / "checkpoints").glob("*.json"))


def read_status(folder: Path) -> dict[str, Any]:
    """`status.json`, or an empty dict."""
    try:
        status = json.loads((folder / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return status if isinstance(status, dict) else {}


def write_status(folder: Path, status: Literal["finished", "restart", "failed"], reason: str) -> None:
    """Tell whoever launched this run what to do now; torchrun's exit code cannot."""
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
        former = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError):
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
