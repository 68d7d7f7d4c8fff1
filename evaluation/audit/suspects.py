"""Confident learning: labels that a model which never saw them contradicts with confidence.

C. G. Northcutt, L. Jiang and I. L. Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels,
JAIR 70 (2021); the computation is cleanlab's. A class's threshold is the mean probability that the images
labelled so get for it. An image is a suspect where its probability of another class is beyond that one's
threshold, and the model prefers another class to the given one.

Example:
    >>> audit = find_suspects(probabilities, labels)
    >>> audit.ranking[: audit.num_suspects]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import wilson_interval

METHOD = (
    "confident learning (Northcutt et al., 2021) with cleanlab: suspects are the off-diagonal of the "
    "confident joint; the share of wrong labels is the off-diagonal mass of the calibrated joint"
)


@dataclass(frozen=True, eq=False)
class LabelAudit:
    """What confident learning says about n labels, in the order in which they came.

    Attributes:
        quality: self-confidence, the probability of the given label, float64, shape (n,); low is suspicious.
        suggested: the class of the largest probability, int64, shape (n,).
        is_suspect: beyond the threshold of another class, bool, shape (n,).
        ranking: positions, int64, shape (n,): suspects first, each part by ascending quality.
        estimated_wrong_fraction: of all labels; an estimate of the model's, not a count.
        pair_counts: of suspects, int64, shape (classes, classes): row = given, column = suggested.
    """

    quality: NDArray[np.float64]
    suggested: NDArray[np.int64]
    is_suspect: NDArray[np.bool_]
    ranking: NDArray[np.int64]
    estimated_wrong_fraction: float
    pair_counts: NDArray[np.int64]

    @property
    def num_suspects(self) -> int:
        return int(self.is_suspect.sum())


def find_suspects(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> LabelAudit:
    """Rank labels by how likely they are wrong.

    Args:
        probabilities: of models that saw none of these images, shape (n, classes).
        labels: as given, shape (n,).

    Raises:
        ValueError: cleanlab is not installed, or fewer than two classes have images.
    """
    try:
        from cleanlab.count import num_label_issues
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise ValueError(
            'cleanlab, which the label audit needs, is not installed: pip install -e ".[audit]"'
        ) from None
    if len(np.unique(labels)) < 2:
        raise ValueError("a label audit needs images of at least two classes")
    probabilities = np.asarray(probabilities, np.float64)
    num_classes = probabilities.shape[1]
    is_suspect = np.asarray(
        find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1), bool
    )
    quality = np.asarray(get_label_quality_scores(labels, probabilities, method="self_confidence"))
    suggested = probabilities.argmax(1).astype(np.int64)
    is_suspect &= suggested != labels  # cleanlab compares with a tolerance
    num_wrong = num_label_issues(labels, probabilities, estimation_method="off_diagonal_calibrated")
    pairs = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(pairs, (labels[is_suspect], suggested[is_suspect]), 1)
    return LabelAudit(
        quality=quality,
        suggested=suggested,
        is_suspect=is_suspect,
        ranking=np.lexsort((np.arange(len(labels)), quality, ~is_suspect)).astype(np.int64),
        estimated_wrong_fraction=float(num_wrong) / len(labels),
        pair_counts=pairs,
    )


@dataclass(frozen=True)
class Accuracy:
    """`num_right` of `num_samples` images."""

    num_right: int
    num_samples: int

    @property
    def top1(self) -> float | None:
        return self.num_right / self.num_samples if self.num_samples else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, Wilson."""
        return wilson_interval(self.num_right, self.num_samples) if self.num_samples else None

    @classmethod
    def of(cls, is_right: NDArray[np.bool_]) -> Accuracy:
        return cls(int(np.count_nonzero(is_right)), len(is_right))


@dataclass(frozen=True)
class BeforeAndAfter:
    """Top-1 of the model that the audit is of, on all images and without the suspects.

    The model is wrong on every suspect, or it would be none. So `without_suspects` is higher by construction:
    as many of its other errors, left out at random, give the same figure. It is no measure of the labels.
    """

    all_images: Accuracy
    without_suspects: Accuracy


def before_and_after(audit: LabelAudit, labels: NDArray[np.int64]) -> BeforeAndAfter:
    is_right = audit.suggested == labels
    return BeforeAndAfter(Accuracy.of(is_right), Accuracy.of(is_right[~audit.is_suspect]))


@dataclass(frozen=True)
class SecondOpinion:
    """What another model, trained apart, says about the suspects; it had no part in choosing them.

    Attributes:
        all_images, kept, suspects: its top-1 against the given labels.
        agrees_on_suspects: of the suspects, for how many it names the suggested class.
        agrees_on_other_errors: for comparison, of the first model's other errors, for how many it names what
            the first one did. Those are less confident errors, and models share the confident ones more: so
            more agreement on suspects proves nothing. Little agreement does: those are the first one's own.
    """

    all_images: Accuracy
    kept: Accuracy
    suspects: Accuracy
    agrees_on_suspects: Accuracy
    agrees_on_other_errors: Accuracy


def second_opinion(
    audit: LabelAudit, labels: NDArray[np.int64], predicted: NDArray[np.int64]
) -> SecondOpinion:
    """Compare with the labels that a second model predicts, int64, shape (n,), in the same order."""
    is_right, agrees = predicted == labels, predicted == audit.suggested
    other_errors = (audit.suggested != labels) & ~audit.is_suspect
    return SecondOpinion(
        all_images=Accuracy.of(is_right),
        kept=Accuracy.of(is_right[~audit.is_suspect]),
        suspects=Accuracy.of(is_right[audit.is_suspect]),
        agrees_on_suspects=Accuracy.of(agrees[audit.is_suspect]),
        agrees_on_other_errors=Accuracy.of(agrees[other_errors]),
    )


def duplicates_of_other_labels(
    crc32c: NDArray[np.uint32], lengths: NDArray[np.uint32], labels: NDArray[np.int64]
) -> list[list[int]]:
    """Groups of positions whose stored bytes agree (CRC-32C and length) but not their labels."""
    content = crc32c.astype(np.uint64) << np.uint64(32) | lengths.astype(np.uint64)
    _, groups, counts = np.unique(content, return_inverse=True, return_counts=True)
    found = []
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(counts)
    for group in np.flatnonzero(counts > 1):
        members = order[ends[group] - counts[group] : ends[group]]
        if len(np.unique(labels[members])) > 1:
            found.append(members.tolist())
    return found
