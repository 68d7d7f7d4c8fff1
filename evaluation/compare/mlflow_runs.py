"""What an MLflow run tells of its training: small artifacts first, metric histories where those are missing.

Example:
    >>> records = read_mlflow_runs("mlflow:imagenet-sprint", "sqlite:///runs/mlflow.db", Path("/tmp/scratch"))
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evaluation.compare.runs import (
    MAX_NAME_LENGTH,
    MAX_RUNS,
    RunRecord,
    read_recipe,
    read_rows,
    read_summary,
    sha256_of,
)
from evaluation.predictions_file import PREDICTIONS_NAME
from train.checkpoint import BEST_NAME, BEST_WEIGHTS_NAME
from train.config import Recipe, parse_recipe
from train.config.credentials import without_credentials
from train.run_folder import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME
from train.tracking.mlflow_client import MlflowMissing, all_runs, first_line, open_client
from train.tracking.mlflow_rows import TRAIN_FIGURES
from train.tracking.mlflow_state import MAX_PARAMETER_LENGTH, load_wanted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PREFIX = "mlflow:"
RUN_ID = re.compile(r"[0-9a-f]{32}")
# Artifact → the most bytes of it that are fetched; a server may hold anything under these names.
SMALL_FILES = {RECIPE_NAME: 1 << 20, SUMMARY_NAME: 16 << 20, METRICS_NAME: 1 << 30}
MAX_CHECKPOINT_BYTES = 16 << 30
MAX_PREDICTIONS_BYTES = 4 << 30
RESULTS = ("loss", "top1", "top5")


def is_mlflow_reference(text: str) -> bool:
    """Whether a RUN of the command line means MLflow: `mlflow:…`, or a run id."""
    return text.startswith(PREFIX) or RUN_ID.fullmatch(text) is not None


def read_mlflow_runs(reference: str, uri: str, scratch: Path) -> tuple[list[RunRecord], str]:
    """The run of an id, or the validated runs of `mlflow:EXPERIMENT`; and a sentence where some are left out.

    Args:
        uri: with credentials, where it has some. scratch: a folder for files that are fetched.

    Raises:
        ValueError: there is no such run or experiment, or MLflow does not answer.
    """
    shown = without_credentials(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"there is no MLflow store at {shown}: name it with --mlflow")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    name = reference.removeprefix(PREFIX)
    left_out = ""
    try:
        client = open_client(uri)
        if RUN_ID.fullmatch(name):
            runs = [client.get_run(name)]
        else:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise ValueError(f"{shown} has no experiment {name!r}: look for it with make ui")
            found = [
                run
                for run in all_runs(client, experiment.experiment_id, "")
                if "val_top1" in run.data.metrics
            ]
            found.sort(key=best_top1_of, reverse=True)
            runs = found[:MAX_RUNS]
            if not runs:
                raise ValueError(f"experiment {name!r} of {shown} has no run that was validated")
            if len(found) > len(runs):
                left_out = (
                    f"Of the {len(found)} runs of {name} these are the {len(runs)} with the best top-1."
                )
        records = [_read_run(client, run, scratch / run.info.run_id) for run in runs]
    except (ValueError, MlflowMissing):
        raise
    except Exception as error:  # MLflow raises all kinds
        raise ValueError(f"MLflow at {shown} has no {name!r} to give ({first_line(error, uri)})") from None
    return records, left_out


def best_top1_of(run: Run) -> float:
    metrics = run.data.metrics
    return float(metrics.get("best_top1", metrics["val_top1"]))


def _read_run(client: MlflowClient, run: Run, scratch: Path) -> RunRecord:
    scratch.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    run_id, data = run.info.run_id, run.data
    sizes = _artifact_sizes(client, run_id, notes)
    for name, most in SMALL_FILES.items():
        if name in sizes and sizes[name] <= most:
            _fetch(client, run_id, name, scratch, notes)
    summary = read_summary(scratch / SUMMARY_NAME, notes) or _summary_of(run)
    if (scratch / RECIPE_NAME).is_file():
        recipe = read_recipe(scratch / RECIPE_NAME, notes)
    else:
        recipe = recipe_of_parameters(data.params)
        if recipe is None:
            notes.append("MLflow has neither its recipe.yaml nor all its parameters: its model is not known.")
    if (scratch / METRICS_NAME).is_file():
        rows = read_rows(scratch / METRICS_NAME, notes)
    else:
        rows = rows_of_histories(client, run_id, data.metrics)
    if run.info.status != "FINISHED":
        notes.append(f"MLflow says that it is {run.info.status}: its figures are those so far.")
    folder = run_folder_on_disk(run)
    checkpoint = folder
    if folder is None:
        best = f"checkpoints/{BEST_NAME}"
        if (
            best in sizes
            and sizes[best] <= MAX_CHECKPOINT_BYTES
            and _fetch(client, run_id, best, scratch, notes)
        ):
            checkpoint = scratch / best
        else:
            notes.append("Neither MLflow nor this machine has its best.pt: nothing is predicted with it.")
    return RunRecord(
        name=str(run.info.run_name or run_id)[:MAX_NAME_LENGTH],
        source=f"{PREFIX}{run_id}",
        folder=folder,
        checkpoint=checkpoint,
        recipe=recipe,
        summary=summary,
        rows=rows,
        checkpoint_sha256=sha256_of(summary),
        saved_predictions=_saved_predictions(client, run_id, sizes, folder, scratch, notes),
        weights_bytes=sizes.get(f"checkpoints/{BEST_WEIGHTS_NAME}"),
        hardware=data.tags.get("hardware"),
        notes=tuple(notes),
    )


def _saved_predictions(
    client: MlflowClient,
    run_id: str,
    sizes: dict[str, int],
    folder: Path | None,
    scratch: Path,
    notes: list[str],
) -> Path | None:
    """Of a report: in the run's folder, or else among the artifacts."""
    name = f"report/{PREDICTIONS_NAME}"
    if folder is not None and (folder / name).is_file():
        return folder / name
    is_small = name in sizes and sizes[name] <= MAX_PREDICTIONS_BYTES
    return scratch / name if is_small and _fetch(client, run_id, name, scratch, notes) else None


def _artifact_sizes(client: MlflowClient, run_id: str, notes: list[str]) -> dict[str, int]:
    """Path → bytes of the files that are wanted here."""
    sizes: dict[str, int] = {}
    try:
        for folder in (None, "checkpoints", "report"):
            for file in client.list_artifacts(run_id, folder):
                if not file.is_dir:
                    sizes[file.path] = file.file_size or 0
    except Exception as error:  # a store of artifacts that is gone; the metrics are there all the same
        notes.append(f"Its artifacts cannot be listed ({first_line(error)}).")
    return sizes


def _fetch(client: MlflowClient, run_id: str, name: str, scratch: Path, notes: list[str]) -> bool:
    wanted = scratch / name
    try:
        fetched = Path(client.download_artifacts(run_id, name, str(scratch)))
        if fetched.resolve() != wanted.resolve():  # MLflow drops the folders before a single file's name
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, wanted)  # not moved: a store may hand out its own file
    except Exception as error:
        notes.append(f"Its artifact {name} cannot be fetched ({first_line(error)}).")
        return False
    return wanted.is_file()


def _summary_of(run: Run) -> dict[str, Any]:
    """The numbers of summary.json, which MLflow has as metrics of a run that has ended."""
    metrics = dict(run.data.metrics)
    if "final_top1" not in metrics:
        return {}
    return metrics | {"stopped_because": None, "mlflow_run_id": run.info.run_id}


def run_folder_on_disk(run: Run) -> Path | None:
    """The run's folder with its checkpoint, where it is on this machine and says that it is this run's."""
    parent, name = run.data.params.get("run.folder"), str(run.info.run_name)
    if parent is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    folder = Path(parent) / name
    wanted = load_wanted(folder)
    is_ours = wanted is not None and wanted.run_id == run.info.run_id
    return folder if is_ours and (folder / "checkpoints" / BEST_NAME).is_file() else None


def rows_of_histories(client: MlflowClient, run_id: str, names: dict[str, float]) -> list[dict[str, Any]]:
    """Metric histories as rows of metrics.jsonl, by rising step, the training's before a validation's."""

    def history(name: str) -> dict[int, float]:
        if name not in names:
            return {}
        return {point.step: point.value for point in client.get_metric_history(run_id, name)}

    epochs = history("epoch")
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for split in ("train", "val"):
        for field in RESULTS:
            for step, value in history(f"{split}_{field}").items():
                rows.setdefault((step, split), {"split": split, "step": step})[field] = value
    for field in TRAIN_FIGURES:
        for step, value in history(field).items():
            if (step, "train") in rows:
                rows[step, "train"][field] = value
    for (step, _), row in rows.items():
        if step in epochs:
            row["epoch"] = epochs[step]
    return [rows[place] for place in sorted(rows)]


def recipe_of_parameters(parameters: dict[str, str]) -> Recipe | None:
    """The recipe that a training logged as parameters, `section.key` → text; None where it is not whole."""
    tree: dict[str, Any] = {}
    try:
        for name, text in parameters.items():
            if len(text) >= MAX_PARAMETER_LENGTH:
                return None  # it was cut there
            *parents, last = name.split(".")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = _value_of(text)
        phases = tree["schedule"]["phases"]
        tree["schedule"]["phases"] = [phases[str(position)] for position in range(len(phases))]
        return parse_recipe(yaml.safe_dump(tree))
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return None


def _value_of(text: str) -> Any:
    """The value of which `text` is Python's writing."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if re.fullmatch(r"\[.*\]|[-+.\de]+", text, re.DOTALL):
        return yaml.safe_load(text)
    return text
