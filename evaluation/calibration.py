"""Whether a model's confidence can be believed, and one number that mends most of it.

The confidence of an answer is the softmax of its class. Of the answers given with a confidence of 80%, 80%
should be right. Pure functions on numpy arrays:

    before = measure_calibration(predictions)              # before.ece = 0.084
    scaling = cross_fit_temperature(predictions)           # scaling.temperature = 1.47
    scaling.after.ece                                      # 0.013

Sources: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (ECE with 15 bins, temperature
scaling); Nixon et al., Measuring Calibration in Deep Learning, CVPRW 2019 (adaptive bins); Brier, Monthly
Weather Review 78 (1950).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from evaluation.metrics import Z_95, Predictions, log_softmax

NUM_BINS = 15
MIN_IMAGES_TO_SCALE = 20  # a temperature of fewer than ten images says nothing
TEMPERATURES = (0.05, 20.0)  # beyond them every confidence is near 1 or near 1 / classes
ROWS_AT_ONCE = 4096  # of logits as float64: 32 MB for a thousand classes


@dataclass(frozen=True)
class CalibrationBin:
    """Answers whose confidence lies in (low, high]; confidence (their mean) and top1 are None where none."""

    low: float
    high: float
    count: int
    confidence: float | None
    top1: float | None
    num_right: int


@dataclass(frozen=True)
class Calibration:
    """Fractions over all images.

    Attributes:
        ece: expected calibration error: |top1 − confidence| of 15 bins of equal width, weighted by their
            images. adaptive_ece: the same with bins of equally many images.
        brier: mean squared distance of the probabilities from the truth, summed over classes: 0 … 2.
        nll: mean negative log-likelihood of the truth (cross-entropy), in nats.
        overconfidence: confidence − top1; overconfidence_error: half its 95% interval.
    """

    confidence: float
    top1: float
    overconfidence: float
    overconfidence_error: float
    ece: float
    adaptive_ece: float
    brier: float
    nll: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class TemperatureScaling:
    """Logits divided by a temperature: above 1 makes a model less sure; no answer changes.

    Attributes:
        temperature: fitted on all images; the one to use.
        fold_temperatures: each fitted on one half.
        after: every image judged with the temperature of the half that it is not in.
    """

    temperature: float
    fold_temperatures: tuple[float, float]
    after: Calibration


def measure_calibration(
    predictions: Predictions, temperatures: NDArray[np.float64] | float = 1.0
) -> Calibration:
    """All figures at once; temperatures: one for all, or float64 (samples,)."""
    confidences, brier, nll = _per_image(predictions, temperatures)
    is_right = predictions.label_ranks == 0
    gaps = confidences - is_right
    bins = calibration_bins(confidences, is_right)
    return Calibration(
        confidence=float(confidences.mean()),
        top1=float(is_right.mean()),
        overconfidence=float(gaps.mean()),
        overconfidence_error=float(Z_95 * gaps.std() / math.sqrt(len(gaps))),
        ece=_weighted_gap(bins, len(gaps)),
        adaptive_ece=adaptive_calibration_error(confidences, is_right),
        brier=float(brier.mean()),
        nll=float(nll.mean()),
        bins=bins,
    )


def calibration_bins(
    confidences: NDArray[np.float64], is_right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> tuple[CalibrationBin, ...]:
    """Bins of equal width over 0 … 1; a confidence on an edge belongs below it. Both arrays (samples,)."""
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(places, minlength=num_bins)
    sums = np.bincount(places, weights=confidences, minlength=num_bins)
    right = np.bincount(places, weights=is_right, minlength=num_bins)
    return tuple(
        CalibrationBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            count=int(counts[i]),
            confidence=float(sums[i] / counts[i]) if counts[i] else None,
            top1=float(right[i] / counts[i]) if counts[i] else None,
            num_right=int(right[i]),
        )
        for i in range(num_bins)
    )


def _weighted_gap(bins: tuple[CalibrationBin, ...], num_samples: int) -> float:
    gaps = [
        b.count * abs(b.top1 - b.confidence) for b in bins if b.top1 is not None and b.confidence is not None
    ]
    return sum(gaps) / num_samples


def adaptive_calibration_error(
    confidences: NDArray[np.float64], is_right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """ECE over bins of equally many images, in the order of confidence (Nixon et al. 2019).

    Equal confidences lie in random order: samples lie by class, and right ones beside right ones would look
    like a difference between bins.
    """
    order = np.lexsort((np.random.default_rng(0).permutation(len(confidences)), confidences))
    parts = np.array_split(order, min(num_bins, len(order)))
    gaps = [len(part) * abs(float((confidences[part] - is_right[part]).mean())) for part in parts]
    return sum(gaps) / len(order)


def fit_temperature(predictions: Predictions, rows: NDArray[np.int64] | None = None) -> float:
    """The temperature of the least NLL on these rows (default: all), within 0.05 … 20.

    The NLL is convex in 1 / temperature, so there is one minimum. Of a model without a mistake it lies at the
    lower end.
    """
    logits, labels = predictions.logits, predictions.labels
    if rows is not None:
        logits, labels = logits[rows], labels[rows]

    def mean_nll(log_temperature: float) -> float:
        return float(_nll(logits, labels, math.exp(log_temperature)).mean())

    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    found = minimize_scalar(mean_nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def cross_fit_temperature(predictions: Predictions, seed: int = 0) -> TemperatureScaling | None:
    """Fit on one half, judge on the other, and the other way round: no image judges its own temperature.

    The halves are drawn by seed and sample id, whatever the order of the rows. None below 20 images.
    """
    num_samples = predictions.num_samples
    if num_samples < MIN_IMAGES_TO_SCALE:
        return None
    shuffled = np.argsort(predictions.sample_ids)[np.random.default_rng(seed).permutation(num_samples)]
    first, second = shuffled[: num_samples // 2], shuffled[num_samples // 2 :]
    of_first, of_second = fit_temperature(predictions, first), fit_temperature(predictions, second)
    temperatures = np.empty(num_samples)
    temperatures[first], temperatures[second] = of_second, of_first
    return TemperatureScaling(
        temperature=fit_temperature(predictions),
        fold_temperatures=(of_first, of_second),
        after=measure_calibration(predictions, temperatures),
    )


def _per_image(
    predictions: Predictions, temperatures: NDArray[np.float64] | float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Confidence of the answer, Brier score and NLL of each image, float64 (samples,) each."""
    num_samples = predictions.num_samples
    temperatures = np.broadcast_to(np.asarray(temperatures, dtype=np.float64), (num_samples,))
    confidences, brier, nll = (np.empty(num_samples) for _ in range(3))
    for start in range(0, num_samples, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        labels = predictions.labels[rows, None]
        log_p = log_softmax(predictions.logits[rows].astype(np.float64) / temperatures[rows, None])
        p = np.exp(log_p)
        true_p = np.take_along_axis(p, labels, axis=1)[:, 0]
        confidences[rows] = np.take_along_axis(p, predictions.predicted_labels[rows, None], axis=1)[:, 0]
        brier[rows] = (p**2).sum(axis=1) - 2 * true_p + 1
        nll[rows] = -np.take_along_axis(log_p, labels, axis=1)[:, 0]
    return confidences, brier, nll


def _nll(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    parts = []
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = log_softmax(logits[rows].astype(np.float64) / temperature)
        parts.append(-np.take_along_axis(log_p, labels[rows, None], axis=1)[:, 0])
    return np.concatenate(parts)
