"""The runs of an MLflow experiment as entries; a checkpoint is fetched when its model is chosen.

Example:
    >>> entries_of_experiment("mlflow:imagenet-sprint", None, Limits(), Path("/tmp/scratch"))
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from evaluation.compare.mlflow_runs import MAX_CHECKPOINT_BYTES, PREFIX, best_top1_of, run_folder_on_disk
from serve.demo.torch_model import open_shown
from serve.page.models import Entry, ShownModel
from serve.portable.limits import Limits
from train.checkpoint import BEST_NAME
from train.config import TrackingSection
from train.config.credentials import without_credentials
from train.tracking.mlflow_client import MlflowMissing, all_runs, first_line, open_client, tracking_uri

MAX_ENTRIES = 50
MAX_NAME_LENGTH = 60
CHECKPOINT = f"checkpoints/{BEST_NAME}"


def entries_of_experiment(
    reference: str, uri: str | None, limits: Limits, scratch: Path, taken: Collection[str] = ()
) -> list[Entry]:
    """The validated runs of `mlflow:EXPERIMENT`, the best ones first.

    Args:
        uri: of MLflow; None: MLFLOW_TRACKING_URI, or else runs/mlflow.db.
        scratch: where checkpoints go. taken: names that others have.

    Raises:
        ValueError: there is no such experiment, no run in it, or MLflow does not answer.
    """
    if not reference.startswith(PREFIX) or reference == PREFIX:
        raise ValueError(f"--mlflow names an experiment as mlflow:NAME, not {reference!r}")
    uri = uri or tracking_uri(TrackingSection(), Path("runs"))
    shown, name = without_credentials(uri), reference.removeprefix(PREFIX)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"there is no MLflow store at {shown}: name it with --tracking-uri")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = open_client(uri)
        experiment = client.get_experiment_by_name(name)
        found = [] if experiment is None else all_runs(client, experiment.experiment_id, "")
    except MlflowMissing:
        raise
    except Exception as error:  # MLflow raises all kinds
        raise ValueError(f"MLflow at {shown} does not answer ({first_line(error, uri)})") from None
    if experiment is None:
        raise ValueError(f"{shown} has no experiment {name!r}: look for it with make ui")
    runs = sorted((run for run in found if "val_top1" in run.data.metrics), key=best_top1_of, reverse=True)
    if not runs:
        raise ValueError(f"experiment {name!r} of {shown} has no run that was validated")
    runs = runs[:MAX_ENTRIES]
    plain = [str(run.info.run_name or run.info.run_id)[:MAX_NAME_LENGTH] for run in runs]
    counts = Counter([*plain, *taken])
    entries = []
    for run, run_name in zip(runs, plain, strict=True):
        run_id = run.info.run_id
        entries.append(
            Entry(
                run_name if counts[run_name] == 1 else f"{run_name} ({run_id[:8]})",
                functools.partial(_open, uri, run_id, run_folder_on_disk(run), limits, scratch),
                f"top-1 {100 * best_top1_of(run):.2f}%",
            )
        )
    return entries


def _open(uri: str, run_id: str, folder: Path | None, limits: Limits, scratch: Path) -> ShownModel:
    if folder is not None:
        return open_shown(folder, limits)
    path = scratch / run_id / CHECKPOINT
    if not path.is_file():
        _fetch(uri, run_id, path)
    return open_shown(path, limits)


def _fetch(uri: str, run_id: str, path: Path) -> None:
    """Put the run's best checkpoint at `path`. ValueError: MLflow has none, or does not give it."""
    shown = without_credentials(uri)
    try:
        client = open_client(uri)
        sizes = {f.path: f.file_size or 0 for f in client.list_artifacts(run_id, "checkpoints")}
        size = sizes.get(CHECKPOINT)
        if size is None or size > MAX_CHECKPOINT_BYTES:
            what = "no" if size is None else "a too large"
            raise ValueError(f"MLflow at {shown} has {what} {CHECKPOINT} of this run: choose another one")
        part = path.parent.parent / "part"
        part.mkdir(parents=True, exist_ok=True)
        fetched = Path(client.download_artifacts(run_id, CHECKPOINT, str(part)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if part in fetched.parents:
            fetched.replace(path)
        else:  # a store on this machine hands out its own file
            path.symlink_to(fetched.resolve())
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"MLflow at {shown} does not give the checkpoint ({first_line(error, uri)})"
        ) from None
