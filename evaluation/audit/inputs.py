"""Where an audit's predictions come from: a model that never saw the split, or the models of a k-fold.

Example:
    >>> audited = of_run(Path("runs/demo"), "data/intel", "val", "auto")
    >>> audited.predictions.probabilities.shape
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data_prep.manifest import load_manifest
from data_prep.plain_json import read_json
from data_prep.storage import is_s3
from evaluation.kfold.command import PREDICTIONS_NAME, TABLE_NAME
from evaluation.kfold.results import OutOfFold, load_out_of_fold, out_of_fold
from evaluation.predict import load_trained, predict
from train.checkpoint import CheckpointStore
from train.data.staging import stage

MAX_TABLE_BYTES = 256 << 20
STAGE_FOLDER = Path("data/staged")


@dataclass(frozen=True, eq=False)
class Audited:
    """Predictions for a split, and whose they are.

    Attributes:
        data: the data set's folder, on this machine.
        facts: names and values, to look up.
    """

    predictions: OutOfFold
    data: Path
    split: Literal["train", "val"]
    title: str
    facts: tuple[tuple[str, str], ...]


def of_run(checkpoint: Path, data: str, split: Literal["train", "val"], loader: str) -> Audited:
    """A held-out model's predictions.

    Args:
        checkpoint: a file, or a run folder: its last checkpoint, since the best one chose its epoch by the
            labels of the val split.

    Raises:
        ValueError: the model was trained on this split.
    """
    if split == "train":
        raise ValueError(
            f"{checkpoint} was trained on the train split, and has learned its labels, wrong ones among "
            "them: run python -m evaluation kfold RECIPE, and audit --kfold DIR"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = _last_checkpoint(checkpoint)
    trained = load_trained(path, device)
    folder = stage(data, trained.recipe.data.stage_folder).folder if is_s3(data) else Path(data)
    predictions = out_of_fold([predict(trained, folder, split, loader)])
    facts = (
        ("data set", f"{data} ({split})"),
        ("predictions", f"of {path}, which was not trained on this split"),
        ("model", f"{trained.recipe.model.library} {trained.recipe.model.name}"),
        ("epoch", str(trained.progress["epoch"])),
    )
    return Audited(predictions, folder, split, f"Labels of {folder.name} ({split})", facts)


def of_kfold(folder: Path, data: str | None) -> Audited:
    """Out-of-fold predictions for the train split.

    Args:
        folder: of `python -m evaluation kfold`. data: of the data set, where it is not where it was.

    Raises:
        ValueError: no finished cross-validation there, or one of another data set.
    """
    try:
        table = read_json(folder / TABLE_NAME, MAX_TABLE_BYTES)
        names, former = tuple(map(str, table["class_names"])), str(table["index_sha256"])
        place, num_folds = data or str(table["data"]), int(table["num_folds"])
        damaged = {int(sample_id) for sample_id in table.get("damaged_sample_ids", [])}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {TABLE_NAME}: let python -m evaluation kfold come to its end"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / TABLE_NAME} cannot be understood: run kfold again") from None
    local = stage(place, STAGE_FOLDER).folder if is_s3(place) else Path(place)
    manifest = load_manifest(local)
    if manifest.class_names != names or manifest.splits["train"].index.sha256 != former:
        raise ValueError(
            f"{place} is not the data set of this cross-validation, or was prepared again since: name it "
            "with --data, or run kfold again"
        )
    predictions = load_out_of_fold(folder / PREDICTIONS_NAME, names)
    num_train = manifest.splits["train"].num_samples
    if predictions.sample_ids.tolist() != [number for number in range(num_train) if number not in damaged]:
        raise ValueError(
            f"{folder / PREDICTIONS_NAME} does not hold each training image once: run kfold again"
        )
    facts = (
        ("data set", f"{place} (train)"),
        ("predictions", f"out of fold, {num_folds} folds of {folder}"),
    )
    return Audited(predictions, local, "train", f"Labels of {local.name} (train)", facts)


def _last_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    store = CheckpointStore(path if path.name == "checkpoints" else path / "checkpoints")
    entry = store.newest_whole()
    if entry is None:
        raise ValueError(f"{path} holds no whole checkpoint: name a run folder, or a checkpoint file")
    return store.folder / entry.name
