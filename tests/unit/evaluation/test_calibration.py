import math

import numpy as np
import pytest

from evaluation.calibration import (
    adaptive_calibration_error,
    calibration_bins,
    cross_fit_temperature,
    fit_temperature,
    measure_calibration,
)
from evaluation.metrics import Predictions


def drawn_from_itself(num_samples=20_000, num_classes=5, scale=1.0, seed=0):
    """Labels drawn from the softmax of logits, so they are calibrated; then the logits are scaled."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(num_samples, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    names = tuple(f"class {label}" for label in range(num_classes))
    return Predictions(scale * logits, labels, rng.permutation(num_samples), names)


def test_figures_of_two_images_by_hand():
    # Probabilities (0.8, 0.2) and (0.6, 0.4), the first right, the second wrong.
    logits = np.log([[0.8, 0.2], [0.6, 0.4]])
    found = measure_calibration(Predictions(logits, np.array([0, 1]), np.arange(2), ("a", "b")))
    assert found.confidence == pytest.approx(0.7)
    assert found.top1 == 0.5 and found.overconfidence == pytest.approx(0.2)
    assert found.ece == pytest.approx((0.2 + 0.6) / 2)  # in bins of their own
    assert found.adaptive_ece == pytest.approx((0.2 + 0.6) / 2)
    assert found.brier == pytest.approx(((0.2**2 + 0.2**2) + (0.6**2 + 0.6**2)) / 2)
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)


def test_gaps_of_one_bin_cancel_and_those_of_two_do_not():
    confidences, is_right = np.array([0.61, 0.65]), np.array([True, False])
    one = calibration_bins(confidences, is_right)[9]
    assert (one.count, one.num_right, one.top1) == (2, 1, 0.5)
    assert one.confidence == pytest.approx(0.63)
    assert one.low == pytest.approx(0.6) and one.high == pytest.approx(2 / 3)
    assert adaptive_calibration_error(confidences, is_right) == pytest.approx((0.39 + 0.65) / 2)


def test_equal_confidences_are_no_gap_however_the_images_lie():
    """A model that always says the same, on images that lie by class."""
    is_right = np.repeat([True, False, False, False], 500)
    found = adaptive_calibration_error(np.full(2000, 0.25), is_right)
    assert found < 0.05, "the error of bins drawn at random, not of one class a bin"


def test_bins_hold_every_image_once_edges_and_certainty_included():
    confidences = np.array([0, 1 / 15, 1.0, 1.0])
    bins = calibration_bins(confidences, np.ones(4, bool))
    assert [b.count for b in bins] == [2, *[0] * 13, 2]
    assert bins[1].top1 is None and bins[1].confidence is None


def test_a_calibrated_model_has_nearly_no_error_and_temperature_one():
    predictions = drawn_from_itself()
    found = measure_calibration(predictions)
    assert found.ece < 0.015 and abs(found.overconfidence) < 2 * found.overconfidence_error
    assert fit_temperature(predictions) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("scale", "sign"), [(3.0, 1), (0.4, -1)])
def test_a_temperature_takes_back_what_made_a_model_too_sure_or_unsure(scale, sign):
    predictions = drawn_from_itself(scale=scale)
    before, scaling = measure_calibration(predictions), cross_fit_temperature(predictions)
    assert sign * before.overconfidence > 0.05 and before.ece > 0.05
    assert scaling.temperature == pytest.approx(scale, rel=0.03)
    assert scaling.fold_temperatures == pytest.approx((scale, scale), rel=0.06)
    assert scaling.after.ece < 0.015 and scaling.after.nll < before.nll
    assert scaling.after.brier < before.brier and scaling.after.top1 == before.top1


def test_no_image_judges_its_own_temperature():
    # The halves of seed 0: one is given labels that agree with the model, the other random ones.
    rng = np.random.default_rng(0)
    logits, ids = 4 * rng.normal(size=(400, 4)), np.arange(400)
    is_first = np.isin(ids, np.random.default_rng(0).permutation(400)[:200])
    labels = np.where(is_first, logits.argmax(axis=1), rng.integers(0, 4, 400))
    predictions = Predictions(logits, labels, ids, tuple("abcd"))
    scaling = cross_fit_temperature(predictions)
    of_sure, of_unsure = scaling.fold_temperatures
    assert of_sure < 0.2 and of_unsure > 5
    # Each half is judged with the temperature that is wrong for it; with its own, the NLL would be below 0.8.
    assert scaling.after.nll > 5


def test_halves_depend_on_the_sample_ids_and_not_on_the_order_of_the_rows():
    predictions = drawn_from_itself(200, scale=2)
    shuffle = np.random.default_rng(1).permutation(200)
    other = Predictions(
        predictions.logits[shuffle],
        predictions.labels[shuffle],
        predictions.sample_ids[shuffle],
        predictions.class_names,
    )
    assert cross_fit_temperature(other).fold_temperatures == pytest.approx(
        cross_fit_temperature(predictions).fold_temperatures
    )


def test_extremes_stay_finite():
    labels = np.arange(30) % 3
    perfect = Predictions(1e4 * np.eye(3)[labels], labels, np.arange(30), tuple("abc"))
    assert measure_calibration(perfect).nll == 0
    assert cross_fit_temperature(perfect).after.ece == 0
    hopeless = Predictions(1e4 * np.eye(3)[(labels + 1) % 3], labels, np.arange(30), tuple("abc"))
    found = measure_calibration(hopeless)
    assert found.brier == 2 and found.ece == 1 and found.nll == 1e4
    assert cross_fit_temperature(hopeless).temperature == pytest.approx(20, rel=0.01)
    few = Predictions(np.eye(3), np.arange(3), np.arange(3), tuple("abc"))
    assert cross_fit_temperature(few) is None
