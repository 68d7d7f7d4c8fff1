"""Whether one model is better than another on the same images, or nothing can be told.

Two models that see the same images make many of the same mistakes, so their difference is known far better
than either accuracy: only the images count that one of them has right and the other wrong.

Example:
    >>> result = compare_pair(baseline, other)
    >>> result.difference, result.interval, result.p_value
    (0.012, (0.004, 0.02), 0.0031)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from evaluation.metrics import Predictions
from evaluation.text import count_text

NUM_RESAMPLES = 10_000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class PairedResult:
    """A model against a baseline on the same images; fractions.

    Attributes:
        difference: top-1 of the model less that of the baseline. interval: 95%, by bootstrap.
        num_only_model, num_only_baseline: images that only one of them has right.
        p_value: McNemar's, exact. adjusted_p: by Holm over all pairs of a comparison.
        agreement: images for which both give the same answer, right or wrong.
    """

    num_images: int
    difference: float
    interval: tuple[float, float]
    num_only_model: int
    num_only_baseline: int
    p_value: float
    adjusted_p: float
    agreement: float

    @property
    def is_told_apart(self) -> bool:
        return self.adjusted_p < SIGNIFICANT


def compare_pair(model: Predictions, baseline: Predictions, seed: int = 0) -> PairedResult:
    """Both must be of the same images, see `same_images`. adjusted_p is p_value until `compare_all` sets "
    "it."""
    model, baseline = in_order(model), in_order(baseline)
    if not same_images(model, baseline):
        raise ValueError("A paired test needs predictions of the same images with the same labels.")
    right, right_baseline = model.label_ranks == 0, baseline.label_ranks == 0
    only_model, only_baseline = int((right & ~right_baseline).sum()), int((~right & right_baseline).sum())
    p_value = mcnemar_p(only_model, only_baseline)
    return PairedResult(
        num_images=model.num_samples,
        difference=(only_model - only_baseline) / model.num_samples,
        interval=bootstrap_interval(only_model, only_baseline, model.num_samples, seed),
        num_only_model=only_model,
        num_only_baseline=only_baseline,
        p_value=p_value,
        adjusted_p=p_value,
        agreement=float((model.predicted_labels == baseline.predicted_labels).mean()),
    )


def compare_all(models: Sequence[Predictions], baseline: Predictions, seed: int = 0) -> list[PairedResult]:
    """Each of `models` against the baseline, with p values that allow for their number (Holm)."""
    results = [compare_pair(model, baseline, seed) for model in models]
    adjusted = holm([result.p_value for result in results])
    return [replace(result, adjusted_p=p) for result, p in zip(results, adjusted, strict=True)]


def mcnemar_p(num_only_first: int, num_only_second: int) -> float:
    """The exact two-sided p value of McNemar's test; 1.0 where two models never differ.

    That is how often as unequal a split of the images on which they differ comes by chance, if each of them
    is as likely to be the right one.

    Q. McNemar, Psychometrika 12 (1947); exact, by the binomial distribution.
    """
    num_different = num_only_first + num_only_second
    if num_different == 0:
        return 1.0
    return float(binomtest(num_only_first, num_different, 0.5).pvalue)


def bootstrap_interval(
    num_only_model: int,
    num_only_baseline: int,
    num_images: int,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """95% percentile interval of the difference of top-1, by resampling images with replacement.

    Of an image only its difference counts (+1, 0 or −1), and how many of each a resample holds is
    multinomial: drawing these counts is drawing the images. B. Efron, Annals of Statistics 7 (1979).
    """
    shares = np.array([num_only_model, num_only_baseline, 0]) / num_images
    shares[2] = max(0.0, 1 - shares[0] - shares[1])
    counts = np.random.default_rng(seed).multinomial(num_images, shares, size=num_resamples)
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / num_images, [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given, for several tests at once.

    S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    num_tests = len(p_values)
    adjusted, largest = [1.0] * num_tests, 0.0
    for position, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (num_tests - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def in_order(predictions: Predictions) -> Predictions:
    """The same predictions by rising sample id."""
    order = np.argsort(predictions.sample_ids, kind="stable")
    if (order == np.arange(len(order))).all():
        return predictions
    return Predictions(
        predictions.logits[order],
        predictions.labels[order],
        predictions.sample_ids[order],
        predictions.class_names,
    )


def same_images(first: Predictions, second: Predictions) -> bool:
    """Whether ids, labels and class names agree; both in order."""
    return (
        first.class_names == second.class_names
        and np.array_equal(first.sample_ids, second.sample_ids)
        and np.array_equal(first.labels, second.labels)
    )


def num_wrong_for_all(models: Sequence[Predictions]) -> int:
    """Images that not one of the models has right."""
    wrong: NDArray[np.bool_] = np.logical_and.reduce([in_order(model).label_ranks > 0 for model in models])
    return int(wrong.sum())


def in_words(name: str, baseline: str, result: PairedResult) -> str:
    """`b is better than a by 1.2 points (95% 0.4 to 2.0, McNemar p = 0.003)`, or that nothing can be told."""
    low, high = (100 * end for end in result.interval)
    points = 100 * result.difference
    p_text = f"McNemar {p_value_text(result.adjusted_p)}"
    if not result.is_told_apart:
        return (
            f"No difference between {name} and {baseline} can be told on "
            f"{count_text(result.num_images, 'image')} "
            f"({signed(points)} points, 95% {signed(low)} to {signed(high)}, {p_text})"
        )
    if points < 0:
        points, low, high = -points, -high, -low
        word = "worse"
    else:
        word = "better"
    return f"{name} is {word} than {baseline} by {points:.1f} points (95% {low:.1f} to {high:.1f}, {p_text})"


def p_value_text(p_value: float) -> str:
    """`p = 0.003`, `p < 0.001`; what is below 0.05 is not rounded up to it."""
    if p_value < 0.001:
        return "p < 0.001"
    if p_value >= 0.1:
        return f"p = {p_value:.2f}"
    text = f"{p_value:.3f}"
    return "p < 0.05" if text == "0.050" and p_value < SIGNIFICANT else f"p = {text}"


def signed(points: float) -> str:
    """`+0.3`, `−0.5`, `0.0`."""
    text = f"{abs(points):.1f}"
    if text == "0.0":
        return text
    return f"{'+' if points > 0 else '−'}{text}"
