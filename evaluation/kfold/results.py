"""What k models say about the training images that each of them did not see: figures, and a file.

Example:
    >>> out_of_fold = load_out_of_fold(Path("runs/demo-kfold/oof.npz"), class_names)
    >>> out_of_fold.probabilities.argmax(1)
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.storage import write_atomically
from evaluation.metrics import EvaluationResults, Predictions, evaluate, softmax, topk_accuracy
from evaluation.predictions_file import read_stored_arrays

# The kind of each array's type, and its dimensions.
ARRAYS = {"probabilities": ("f", 2), "labels": ("i", 1), "sample_ids": ("i", 1), "fold": ("i", 1)}


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Predictions for every training image by the model that did not see it, in sample-id order.

    Attributes:
        probabilities: softmax, float32, shape (n, classes).
        labels, sample_ids, fold: int64, shape (n,).
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    fold: NDArray[np.int64]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class FoldFigures:
    """Accuracies on one fold, fractions."""

    fold: int
    num_samples: int
    top1: float
    top5: float


@dataclass(frozen=True, eq=False)
class KfoldResults:
    """Figures over folds.

    Attributes:
        mean, std: of "top1" and "top5" over folds; the standard deviation is that of a sample (n - 1).
        pooled: every training image counted once, with Wilson intervals.
    """

    folds: tuple[FoldFigures, ...]
    mean: dict[str, float]
    std: dict[str, float]
    pooled: EvaluationResults


def pool(of_folds: Sequence[Predictions]) -> tuple[Predictions, NDArray[np.int64]]:
    """The predictions of all folds in sample-id order, and the fold of each sample.

    Raises:
        ValueError: a sample is in two folds.
    """
    ids = np.concatenate([predictions.sample_ids for predictions in of_folds])
    order = np.argsort(ids, kind="stable")
    pooled = Predictions(
        np.concatenate([predictions.logits for predictions in of_folds])[order],
        np.concatenate([predictions.labels for predictions in of_folds])[order],
        ids[order],
        of_folds[0].class_names,
    )
    sizes = [predictions.num_samples for predictions in of_folds]
    return pooled, np.repeat(np.arange(len(of_folds)), sizes)[order]


def summarize(of_folds: Sequence[Predictions]) -> KfoldResults:
    """Figures of each fold, over folds, and of all samples together."""
    folds = tuple(
        FoldFigures(number, predictions.num_samples, *(topk_accuracy(predictions, k) for k in (1, 5)))
        for number, predictions in enumerate(of_folds)
    )
    values = {name: [getattr(figures, name) for figures in folds] for name in ("top1", "top5")}
    return KfoldResults(
        folds=folds,
        mean={name: statistics.mean(of_name) for name, of_name in values.items()},
        std={name: statistics.stdev(of_name) for name, of_name in values.items()},
        pooled=evaluate(pool(of_folds)[0]),
    )


def out_of_fold(of_folds: Sequence[Predictions]) -> OutOfFold:
    """The predictions of all folds, in sample-id order; of one model alone, all are of fold 0."""
    pooled, folds = pool(of_folds)
    return OutOfFold(
        softmax(pooled.logits), pooled.labels, pooled.sample_ids, folds, tuple(pooled.class_names)
    )


def save_out_of_fold(path: Path, predictions: OutOfFold) -> None:
    """Write probabilities, labels, sample_ids and fold as .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(predictions, name) for name in ARRAYS})
    write_atomically(path, buffer.getvalue())


def load_out_of_fold(path: Path, class_names: Sequence[str]) -> OutOfFold:
    """Read `oof.npz`, or another file of those arrays as `numpy.savez` writes it; nothing in it is executed.

    Raises:
        ValueError: it is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: let python -m evaluation kfold come to its end")
    try:
        arrays = read_stored_arrays(path, ARRAYS)
    except ValueError as error:
        raise ValueError(f"{path} is no file of out-of-fold predictions ({error})") from None
    probabilities = arrays.pop("probabilities")
    shapes = {array.shape for array in arrays.values()}
    fits = shapes == {probabilities.shape[:1]} and probabilities.shape[1:] == (len(class_names),)
    if not fits or not len(probabilities):
        raise ValueError(f"{path} does not hold predictions for {len(class_names)} classes: run kfold again")
    labels = arrays["labels"]
    in_range = labels.min() >= 0 and labels.max() < len(class_names)
    # The sum is that of float32 numbers; of a NaN it is none of these.
    sums_to_one = np.abs(probabilities.sum(1, dtype=np.float64) - 1).max() < 1e-3
    if not in_range or not sums_to_one or probabilities.min() < 0:
        raise ValueError(f"{path} holds labels or probabilities that are none: run kfold again")
    return OutOfFold(
        probabilities.astype(np.float32),
        labels.astype(np.int64),
        arrays["sample_ids"].astype(np.int64),
        arrays["fold"].astype(np.int64),
        tuple(class_names),
    )
