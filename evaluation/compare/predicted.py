"""The predictions of a run: those that a report saved, where they are of its checkpoint, else made now.

Example:
    >>> found = saved_predictions(record, "val", data_sha256=None, view="96 px, crop 1")
    >>> found.predictions.num_samples, found.data_sha256
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.manifest import load_manifest
from data_prep.storage import sha256_file
from evaluation.compare.paired import in_order
from evaluation.compare.runs import RunRecord, index_sha256
from evaluation.metrics import Predictions
from evaluation.predict import TrainedModel, checkpoint_file, predict
from evaluation.predictions_file import PREDICTIONS_NAME, load_predictions, report_folder


@dataclass(frozen=True, eq=False)
class FoundPredictions:
    """In the order of the sample ids; data_sha256: of the split's sample index, "" where it is not known."""

    predictions: Predictions
    data_sha256: str


def saved_predictions(
    record: RunRecord, split: str, *, data_sha256: str | None, view: str | None
) -> tuple[FoundPredictions | None, str]:
    """(what a report saved, a sentence where that cannot be used).

    Args:
        data_sha256: the sample index that they must be of; None: any, the comparison groups them.
        view: in words, as the run's headline is seen; None where the recipe is not known, then any.
    """
    path = record.saved_predictions
    if split != "val" and record.folder is not None:
        own = record.folder / report_folder(split) / PREDICTIONS_NAME
        path = own if own.is_file() else path
    if path is None:
        return None, ""
    try:
        saved = load_predictions(path)
    except (ValueError, OSError) as error:
        return None, f"Its saved predictions cannot be used: {error}."
    digest = checkpoint_sha256(record)
    if not saved.checkpoint_sha256 or saved.checkpoint_sha256 != digest:
        return None, "Its saved predictions are of another checkpoint and were passed over."
    if saved.split != split:
        return None, f"Its saved predictions are of the split {saved.split!r} and were passed over."
    if view is not None and saved.view != view:
        return None, f"Its saved predictions are of another view ({saved.view[:60]}) and were passed over."
    if not saved.data_index_sha256 or data_sha256 not in (None, saved.data_index_sha256):
        return None, "Its saved predictions are of other data and were passed over."
    return FoundPredictions(in_order(saved), saved.data_index_sha256), ""


def checkpoint_sha256(record: RunRecord) -> str | None:
    """Of best.pt as it is now; without one, as the run recorded it."""
    path = record.checkpoint
    return record.checkpoint_sha256 if path is None else sha256_file(checkpoint_file(path))


def new_predictions(
    trained: TrainedModel, data: Path, split: Literal["train", "val"], loader: str
) -> FoundPredictions:
    """As the run validates itself. ValueError: the data set has other classes, or no such split."""
    predictions = in_order(predict(trained, data, split, loader))
    return FoundPredictions(predictions, index_sha256(load_manifest(data), split) or "")
