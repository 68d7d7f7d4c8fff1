"""Each human dimension as a weighted sum of the features: ridge regression, judged on rows it has not seen.

The penalty is chosen inside each training part by cross-validation of its own, so the R² is of new rows
altogether. With samples of classes there are two such figures: new samples of known classes, and new classes,
which is much harder.

Example:
    >>> fit_ridge(features, human, groups=labels).new_classes.mean_r2
    0.31
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PENALTIES = np.logspace(-4, 1, 11)  # a row, for features of total variance 1
NUM_FOLDS = 5


@dataclass(frozen=True)
class HeldOutR2:
    """Cross-validated R² of each dimension: 1 − squared error / squared distance from the training part's
    mean.

    0 is no better than that mean; it can be negative. `penalties` are those chosen, one a fold.
    """

    r2: list[float]
    mean_r2: float
    penalties: list[float]


@dataclass(frozen=True)
class RidgeFit:
    """`new_rows`: rows dealt out at random. `new_classes`: whole groups left out; None without groups."""

    new_rows: HeldOutR2
    new_classes: HeldOutR2 | None


def fit_ridge(features: Array, human: Array, groups: NDArray[np.int64] | None, seed: int = 0) -> RidgeFit:
    """Ridge regression of `human` (rows, D) on `features` (rows, F), cross-validated."""
    centred = features - features.mean(0)
    scaled = centred * (np.sqrt(len(features)) / np.linalg.norm(centred))  # the penalties are for this scale
    rows = np.random.default_rng(seed).permutation(
        len(human)
    )  # every row a group of its own, in random order
    new_classes = None
    if groups is not None and len(np.unique(groups)) >= 4:
        new_classes = _held_out_r2(scaled, human, _in_random_order(groups, seed))
    return RidgeFit(_held_out_r2(scaled, human, rows), new_classes)


def _in_random_order(groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    names, ordinals = np.unique(groups, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(names))[ordinals]


def _held_out_r2(features: Array, human: Array, units: NDArray[np.int64]) -> HeldOutR2:
    error, variance, penalties = np.zeros(human.shape[1]), np.zeros(human.shape[1]), []
    for train, test in _folds(units):
        inner_error = np.zeros(len(PENALTIES))
        for fitted, judged in _folds(units[train]):
            predicted = _predictions(
                features[train[fitted]], human[train[fitted]], features[train[judged]], PENALTIES
            )
            inner_error += ((predicted - human[train[judged]]) ** 2).sum((1, 2))
        penalty = PENALTIES[[int(inner_error.argmin())]]
        predicted = _predictions(features[train], human[train], features[test], penalty)[0]
        error += ((human[test] - predicted) ** 2).sum(0)
        variance += ((human[test] - human[train].mean(0)) ** 2).sum(0)
        penalties.append(float(penalty[0]))
    r2 = 1 - error / variance
    return HeldOutR2(r2.tolist(), float(r2.mean()), penalties)


def _folds(units: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to fit and rows to judge, five times, with all rows of a unit on one side."""
    names = np.unique(units)
    for part in np.array_split(names, min(NUM_FOLDS, len(names))):
        judged = np.isin(units, part)
        yield np.flatnonzero(~judged), np.flatnonzero(judged)


def _predictions(features: Array, human: Array, new_features: Array, penalties: Array) -> Array:
    """Predictions for new rows with each penalty: (penalties, new rows, D).

    In the dual form, with one eigendecomposition for all penalties: a solver of a library would be called
    some hundreds of times for a layer. The tests compare it with scikit-learn's.
    """
    mean, human_mean = features.mean(0), human.mean(0)
    centred = features - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    products = (new_features - mean) @ centred.T @ vectors
    target = vectors.T @ (human - human_mean)
    shrunk = 1 / (np.maximum(values, 0) + penalties[:, None] * len(features))
    return products @ (shrunk[:, :, None] * target) + human_mean
