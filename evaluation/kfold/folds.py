"""What is asked of each fold's training: that it is of this data set, what it began with, its predictions.

Example:
    >>> check_data([Path("runs/demo-kfold/demo-fold0")], manifest.splits["train"].index.sha256, "data/intel")
    >>> judged = predict_fold(Path("runs/demo-kfold/demo-fold0"), recipe.data, Path("data/intel"), device)
    >>> judged.weights_at_start
    'pretrained'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.manifest import load_manifest
from evaluation.metrics import Predictions
from evaluation.predict import load_trained, predict
from train.checkpoint import CheckpointStore, load_checkpoint
from train.config import DataSection, ScheduleSection


@dataclass(frozen=True, eq=False)
class JudgedFold:
    """A fold's held-out images as the model sees them that was trained without them.

    Attributes:
        predictions: damaged images are not among them.
        weights_at_start: what this training really began with: random, pretrained or checkpoint.
    """

    predictions: Predictions
    weights_at_start: str


def check_data(run_folders: Sequence[Path], index_sha256: str, data: str) -> None:
    """Compare the data set with that of each fold that has a checkpoint, finished or not.

    Args:
        index_sha256: of the train split's sample index. data: the name of the data set, for the message.

    Raises:
        ValueError: a fold was trained on other images, so "out of fold" would not be true of it.
    """
    for folder in run_folders:
        path = _last_checkpoint(folder)
        if path is not None:
            _check_identity(
                load_checkpoint(path, check_sha256=False).get("data_identity"), index_sha256, folder, data
            )


def predict_fold(run_folder: Path, config: DataSection, data: Path, device: torch.device) -> JudgedFold:
    """With the last checkpoint: the best one chose its epoch on this very fold.

    Args:
        config: `folds`, `fold` and `fold_seed` as they must be; the loader.
        data: of the shards, on a disk of this machine.

    Raises:
        ValueError: it was trained on another data set.
        RuntimeError: no whole checkpoint, or one of another fold.
    """
    path = _last_checkpoint(run_folder)
    if path is None:
        raise RuntimeError(f"{run_folder} holds no whole checkpoint: delete that run, and start again")
    trained = load_trained(path, device)
    asked, found = ((c.folds, c.fold, c.fold_seed) for c in (config, trained.recipe.data))
    if found != asked:
        raise RuntimeError(f"{run_folder} is of another fold: delete that run, and start again")
    index_sha256 = load_manifest(data).splits["train"].index.sha256
    _check_identity(trained.data_identity, index_sha256, run_folder, str(config.path))
    predictions = predict(trained, data, "train", config.loader, held_out=True, leave_out_damaged=True)
    weights = trained.progress.get("weights_at_start") or trained.recipe.weights_at_start
    return JudgedFold(predictions, str(weights))


def steered_by_folds(schedule: ScheduleSection) -> str:
    """A sentence where the held-out images decided about the training that they judge; else empty."""
    by = [
        *(["early stopping"] if schedule.early_stopping is not None else []),
        *(["a plateau phase"] if any(phase.kind == "plateau" for phase in schedule.phases) else []),
    ]
    if not by:
        return ""
    return (
        f"{' and '.join(by)} looked at each fold while the model was trained that the fold judges, so its "
        "figures are somewhat too good: leave that out of the recipe for a clean figure."
    )


def different_weights(weights_at_start: Sequence[str]) -> str:
    """A sentence where the folds began with different weights, else an empty text."""
    if len(set(weights_at_start)) < 2:
        return ""
    each = ", ".join(f"fold {fold}: {weights}" for fold, weights in enumerate(weights_at_start))
    return (
        f"Folds began with different weights ({each}): their mean is not that of one recipe. Delete the runs "
        "with the wrong ones, and start again."
    )


def _last_checkpoint(run_folder: Path) -> Path | None:
    store = CheckpointStore(run_folder / "checkpoints")
    entry = store.newest_whole()
    return None if entry is None else store.folder / entry.name


def _check_identity(found: object, index_sha256: str, run_folder: Path, data: str) -> None:
    if found != index_sha256:
        raise ValueError(
            f"{run_folder} was trained on another version of {data} (its samples or their order differ), and "
            "has seen images that it would be judged by: choose another --out, or go back to that data set"
        )
