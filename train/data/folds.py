"""Folds for cross-validation: which samples of the training split a run learns from, and which it is held to.

A sample's fold is a pure function of (`data.fold_seed`, labels): stratified by class, every sample in exactly
one fold. Sizes differ by at most one, in each class and in all. Samples keep their ids, so crops and flips
are those they have without folds. Near duplicates and groups (frames of one film, images of one patient) are
not kept together: where there are such, figures over folds are too good.

Example:
    >>> part = FoldPart(num_folds=5, fold=0, seed=0, is_held_out=True)
    >>> part.sample_ids(index["label"])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.manifest import Manifest
from train.config import DataSection

FOLD_STREAM = 3  # told apart from other numbers that are drawn from a seed


@dataclass(frozen=True)
class FoldPart:
    """One of `num_folds` folds, or all but that one.

    Attributes:
        fold: counted from 0.
        seed: of the assignment, `data.fold_seed`.
        is_held_out: the fold itself, which validates; else the others, which train.
    """

    num_folds: int
    fold: int
    seed: int
    is_held_out: bool

    def sample_ids(self, labels: np.ndarray) -> np.ndarray:
        """Ids of its samples in ascending order: int64, shape (n,).

        Args:
            labels: of the whole split in sample-id order, integers, shape (num_samples,).
        """
        folds = assign_folds(labels, self.num_folds, self.seed)
        return np.flatnonzero((folds == self.fold) == self.is_held_out).astype(np.int64)

    def class_counts(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """How many samples of each class it has; `counts` are those of the whole split."""
        sizes = fold_sizes(counts, self.num_folds)[self.fold]
        return tuple((sizes if self.is_held_out else np.array(counts) - sizes).tolist())


def assign_folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """The fold of every sample: int64, shape (n,)."""
    labels = np.asarray(labels)
    folds = np.empty(len(labels), np.int64)
    offset = 0
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        # Of the class alone, so that images added to one class do not shuffle the others' among themselves.
        shuffled = np.random.default_rng([seed, FOLD_STREAM, label]).permutation(members)
        folds[shuffled] = (offset + np.arange(len(members))) % num_folds
        offset += len(members)  # the next class goes on where this one ended: whole folds are even, too
    return folds


def fold_sizes(class_counts: tuple[int, ...], num_folds: int) -> np.ndarray:
    """Samples of each class in each fold, from the counts alone: int64, shape (num_folds, classes)."""
    ends = np.cumsum((0, *class_counts))
    folds = np.arange(num_folds)[:, None]
    # How many of the running numbers 0 … end-1 leave the remainder `fold`.
    before = (ends[None, :] + num_folds - 1 - folds) // num_folds
    return np.diff(before, axis=1).astype(np.int64)


def fold_part(data: DataSection, is_held_out: bool) -> FoldPart | None:
    """The part that a recipe asks for; None: it has no folds."""
    if data.folds is None or data.fold is None:
        return None
    return FoldPart(data.folds, data.fold, data.fold_seed, is_held_out)


def fold_identity(data: DataSection) -> list[int] | None:
    """What decides which samples are held out, as saved in checkpoints: [folds, fold, fold_seed]."""
    part = fold_part(data, is_held_out=True)
    return None if part is None else [part.num_folds, part.fold, part.seed]


def class_counts_of(manifest: Manifest, data: DataSection) -> dict[str, tuple[int, ...]]:
    """Samples of each class that a run trains on (`train`) and is validated on (`val`)."""
    counts = {split: manifest.splits[split].class_counts for split in manifest.splits}
    nothing = (0,) * manifest.num_classes
    train = counts.get("train", nothing)
    kept, held_out = (fold_part(data, is_held_out) for is_held_out in (False, True))
    if kept is None or held_out is None:
        return {"train": train, "val": counts.get("val", nothing)}
    return {"train": kept.class_counts(train), "val": held_out.class_counts(train)}
