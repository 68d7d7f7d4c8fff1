"""What a classifier's logits say about a split: accuracies, intervals, confusions.

Pure functions on numpy arrays, without torch, files or plots. For example:

    predictions = Predictions(logits, labels, sample_ids, class_names)
    topk_accuracy(predictions, 1)                      # 0.7631
    wilson_interval(38_155, 50_000)                    # (0.7594, 0.7668)
    most_confused_pairs(confusion_matrix(predictions), limit=10)

One rule settles every tie: of equal logits, the lower label ranks first. It is what `argmax` does, so
top-1 accuracy, the confusion matrix and the per-class table always agree with each other.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# The 97.5% quantile of the normal distribution: 95% lie within ± this many standard deviations.
Z_95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of a model for every sample of a split.

    Shapes: logits float32 (n, classes), labels int64 (n,), sample_ids int64 (n,); class_names holds one name
    a label, in label order (a name may occur twice: ImageNet has two "crane"s). Other float and integer
    types are converted. Raises ValueError where the shapes disagree, the split is empty, a label has no
    class, a sample comes twice (each must count once) or a logit is not finite.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", np.asarray(self.logits, dtype=np.float32))
        object.__setattr__(self, "labels", _as_int64(self.labels, "labels"))
        object.__setattr__(self, "sample_ids", _as_int64(self.sample_ids, "sample_ids"))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if self.logits.ndim != 2:
            raise ValueError(f"logits must have the shape (samples, classes), not {self.logits.shape}.")
        num_samples, num_classes = self.logits.shape
        if num_samples == 0:
            raise ValueError("There are no samples to evaluate: the split is empty.")
        for name, values in (("labels", self.labels), ("sample_ids", self.sample_ids)):
            if values.shape != (num_samples,):
                raise ValueError(
                    f"{name} must have the shape ({num_samples},) like the logits, not {values.shape}."
                )
        if len(self.class_names) != num_classes:
            raise ValueError(
                f"There are {len(self.class_names)} class names for {num_classes} logits a sample: "
                "the checkpoint and the data set do not have the same classes."
            )

    def _check_values(self) -> None:
        outside = (self.labels < 0) | (self.labels >= self.num_classes)
        if outside.any():
            raise ValueError(
                f"Label {self.labels[outside][0]} has no class: labels must be in 0 … {self.num_classes - 1}."
            )
        ids, counts = np.unique(self.sample_ids, return_counts=True)
        if len(ids) < self.num_samples:
            raise ValueError(
                f"Sample {ids[counts > 1][0]} comes more than once: every sample must count exactly once."
            )
        broken = ~np.isfinite(self.logits).all(axis=1)
        # A NaN is neither above nor below any other logit, so it would pass for a right answer.
        if broken.any():
            raise ValueError(
                f"The logits of {broken.sum()} of {self.num_samples} samples are not finite "
                f"(first: sample {self.sample_ids[broken][0]}): the weights have diverged or overflowed."
            )

    @property
    def num_samples(self) -> int:
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def predicted_labels(self) -> NDArray[np.int64]:
        """The label of the largest logit of each sample, int64 (n,)."""
        return self.logits.argmax(axis=1).astype(np.int64)

    @cached_property
    def label_ranks(self) -> NDArray[np.int64]:
        """How many classes rank before the true one, int64 (n,): 0 where the prediction is right."""
        true_logits = np.take_along_axis(self.logits, self.labels[:, None], axis=1)
        larger = (self.logits > true_logits).sum(axis=1)
        lower_label = np.arange(self.num_classes) < self.labels[:, None]
        tied_before = ((self.logits == true_logits) & lower_label).sum(axis=1)
        return larger + tied_before


@dataclass(frozen=True)
class ClassMetrics:
    """One class of a split. All but label, name and count are None where the split has no sample of it.

    top1 is the class's recall; precision, the share of the answers of this class that are right, is None
    where it never was the answer; f1 is 2 right / (samples + answers), 0 there.
    """

    label: int
    name: str
    count: int
    top1: float | None
    top1_interval: tuple[float, float] | None
    top5: float | None
    most_common_error: int | None  # the label it is most often taken for; None too where it never is wrong
    most_common_error_count: int
    precision: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class ConfusedPair:
    """`count` samples of the class `true_label`, `fraction` of all it has, were predicted as another."""

    true_label: int
    predicted_label: int
    count: int
    fraction: float


@dataclass(frozen=True, eq=False)
class EvaluationResults:
    """All that a report says about a split. confusion: int64 (classes, classes); table in label order.

    The macro figures are means over the classes that have a sample, each counting the same; a class that
    never was the answer has a precision of 0 there.
    """

    num_samples: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    macro_recall: float
    macro_precision: float
    macro_f1: float
    table: list[ClassMetrics]
    confusion: NDArray[np.int64]
    most_confused: list[ConfusedPair]


def evaluate(predictions: Predictions, num_pairs: int = 10) -> EvaluationResults:
    """Every metric of this module at once; `num_pairs` limits the most confused pairs."""
    confusion = confusion_matrix(predictions)
    table = per_class_table(predictions)
    seen = [row for row in table if row.count]
    num_in_top1, num_in_top5 = (int(np.count_nonzero(predictions.label_ranks < k)) for k in (1, 5))
    return EvaluationResults(
        num_samples=predictions.num_samples,
        top1=topk_accuracy(predictions, 1),
        top1_interval=wilson_interval(num_in_top1, predictions.num_samples),
        top5=topk_accuracy(predictions, 5),
        top5_interval=wilson_interval(num_in_top5, predictions.num_samples),
        macro_recall=sum(row.top1 or 0.0 for row in seen) / len(seen),
        macro_precision=sum(row.precision or 0.0 for row in seen) / len(seen),
        macro_f1=sum(row.f1 or 0.0 for row in seen) / len(seen),
        table=table,
        confusion=confusion,
        most_confused=most_confused_pairs(confusion, num_pairs),
    )


def topk_accuracy(predictions: Predictions, k: int) -> float:
    """The fraction of samples whose label is among the k largest logits.

    Of equal logits the lower label counts as larger. Any k ≥ the number of classes gives 1.0. Raises
    ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    return float(np.count_nonzero(predictions.label_ranks < k) / predictions.num_samples)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval (low, high) of a fraction of which `successes` of `n` were seen.

    Unlike ± 1.96 standard errors it stays within 0 … 1 and keeps a width at 0 of n and n of n, which small
    classes need. E. B. Wilson, JASA 22 (1927). Raises ValueError unless 0 ≤ successes ≤ n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"An interval needs 0 ≤ successes ≤ n and n > 0, not {successes} of {n}.")
    fraction = successes / n
    z2_n = Z_95**2 / n
    centre = (fraction + z2_n / 2) / (1 + z2_n)
    half = Z_95 * math.sqrt(fraction * (1 - fraction) / n + z2_n / (4 * n)) / (1 + z2_n)
    # Exact at the ends, where rounding would leave 1e-17 or 0.9999999.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Counts, int64 (classes, classes): row = true label, column = predicted label."""
    num_classes = predictions.num_classes
    cells = predictions.labels * num_classes + predictions.predicted_labels
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def per_class_table(predictions: Predictions) -> list[ClassMetrics]:
    """One row a class, in label order, classes without a sample included.

    Of equally common errors the lower label is named.
    """
    matrix = confusion_matrix(predictions)
    counts = matrix.sum(axis=1)
    answers = matrix.sum(axis=0)
    right = matrix.diagonal()
    in_top5 = np.bincount(predictions.labels[predictions.label_ranks < 5], minlength=predictions.num_classes)
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    worst = errors.argmax(axis=1)
    rows = []
    for label, name in enumerate(predictions.class_names):
        count, num_right = int(counts[label]), int(right[label])
        error_count, num_answers = int(errors[label, worst[label]]), int(answers[label])
        rows.append(
            ClassMetrics(
                label=label,
                name=name,
                count=count,
                top1=num_right / count if count else None,
                top1_interval=wilson_interval(num_right, count) if count else None,
                top5=int(in_top5[label]) / count if count else None,
                most_common_error=int(worst[label]) if error_count else None,
                most_common_error_count=error_count,
                precision=num_right / num_answers if count and num_answers else None,
                f1=2 * num_right / (count + num_answers) if count else None,
            )
        )
    return rows


def most_confused_pairs(matrix: NDArray[np.int64], limit: int) -> list[ConfusedPair]:
    """The `limit` largest errors of a confusion matrix, largest first; fewer where there are fewer.

    A pair has a direction: a taken for b and b taken for a are two pairs. Equal counts are ordered by the
    share of the true class, then by label. Raises ValueError for a matrix that is not square or limit < 0.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"A confusion matrix is square, not {matrix.shape}.")
    if limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit}.")
    class_counts = matrix.sum(axis=1)
    true, predicted = np.nonzero(matrix)
    wrong = true != predicted
    true, predicted = true[wrong], predicted[wrong]
    counts = matrix[true, predicted]
    fractions = counts / class_counts[true]
    order = np.lexsort((predicted, true, -fractions, -counts))[:limit]
    return [ConfusedPair(int(true[i]), int(predicted[i]), int(counts[i]), float(fractions[i])) for i in order]


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis, same shape, float64; finite for finite logits."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis, same shape, float32; finite for any finite logits."""
    logits = np.asarray(logits, dtype=np.float32)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def distinct_names(class_names: Sequence[str]) -> list[str]:
    """The names, with the label appended where several classes share one: "crane (134)", "crane (517)"."""
    occurrences = Counter(class_names)
    return [f"{name} ({label})" if occurrences[name] > 1 else name for label, name in enumerate(class_names)]


def finite_number(value: object) -> float | None:
    """The number that a JSON field holds; None for a missing field, text, true/false, NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _as_int64(values: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}.")
    return array.astype(np.int64)
