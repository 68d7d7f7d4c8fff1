from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from evaluation.compare.paired import (
    PairedResult,
    bootstrap_interval,
    compare_all,
    compare_pair,
    holm,
    in_words,
    mcnemar_p,
    num_wrong_for_all,
    p_value_text,
)
from tests.unit.evaluation.compare.made_up import make_predictions


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (1, 8, 2 * (1 + 9) / 2**9),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemar_by_hand(first, second, p_value):
    assert mcnemar_p(first, second) == pytest.approx(p_value)
    assert mcnemar_p(second, first) == pytest.approx(p_value)


def test_mcnemar_is_twice_the_binomial_tail():
    assert mcnemar_p(140, 101) == pytest.approx(2 * binom.sf(139, 241, 0.5))


def test_bootstrap_agrees_with_resampling_the_images_themselves():
    rng = np.random.default_rng(3)
    differences = np.concatenate([np.ones(30), -np.ones(12), np.zeros(258)])
    drawn = [rng.choice(differences, 300).mean() for _ in range(4000)]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert bootstrap_interval(30, 12, 300) == pytest.approx(expected, abs=0.004)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    shares, num_images, covered = [0.12, 0.08, 0.80], 800, 0
    for seed in range(300):
        only_a, only_b, _ = rng.multinomial(num_images, shares)
        low, high = bootstrap_interval(only_a, only_b, num_images, seed=seed, num_resamples=1000)
        covered += low <= 0.04 <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_bootstrap_is_seeded_and_knows_models_that_never_differ():
    assert bootstrap_interval(9, 4, 100) == bootstrap_interval(9, 4, 100)
    assert bootstrap_interval(0, 0, 100) == (0.0, 0.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pair_by_hand():
    right = np.array([1, 1, 1, 1, 0, 0, 0, 1, 1, 1], dtype=bool)
    right_baseline = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    result = compare_pair(make_predictions(right), make_predictions(right_baseline))
    assert (result.num_images, result.num_only_model, result.num_only_baseline) == (10, 3, 1)
    assert result.difference == pytest.approx(0.2)
    assert result.p_value == pytest.approx(2 * (1 + 4) / 2**4)
    assert result.agreement == pytest.approx(0.6)
    assert num_wrong_for_all([make_predictions(right), make_predictions(right_baseline)]) == 2


def test_the_order_of_the_samples_does_not_matter():
    rng = np.random.default_rng(0)
    right, other = rng.random(200) < 0.8, rng.random(200) < 0.6
    plain = compare_pair(make_predictions(right), make_predictions(other))
    assert compare_pair(make_predictions(right, shuffle=True), make_predictions(other)) == plain


@pytest.mark.parametrize("change", [{"first_id": 7}, {"names": ["w", "x", "y", "z"]}])
def test_other_images_or_classes_are_refused(change):
    right = np.ones(20)
    with pytest.raises(ValueError, match="same images"):
        compare_pair(make_predictions(right), make_predictions(right, **change))


def test_several_models_are_corrected_together():
    right = np.ones(400, dtype=bool)
    worse, slightly = right.copy(), right.copy()
    worse[:40], slightly[:6] = False, False
    results = compare_all([make_predictions(worse), make_predictions(slightly)], make_predictions(right))
    assert results[0].adjusted_p == pytest.approx(2 * results[0].p_value)
    assert results[1].adjusted_p == pytest.approx(results[1].p_value) == pytest.approx(2 / 2**6)


def result_of(difference, interval, p_value):
    return PairedResult(1800, difference, interval, 0, 0, p_value, p_value, 0.9)


def test_words():
    better = result_of(0.012, (0.004, 0.0204), 0.003)
    assert (
        in_words("b", "a", better) == "b is better than a by 1.2 points (95% 0.4 to 2.0, McNemar p = 0.003)"
    )
    worse = result_of(-0.012, (-0.0204, -0.004), 0.0004)
    assert in_words("b", "a", worse) == "b is worse than a by 1.2 points (95% 0.4 to 2.0, McNemar p < 0.001)"
    unknown = result_of(0.003, (-0.005, 0.011), 0.41)
    assert in_words("b", "a", unknown) == (
        "No difference between b and a can be told on 1,800 images "
        "(+0.3 points, 95% −0.5 to +1.1, McNemar p = 0.41)"
    )


def test_p_values_are_never_rounded_to_nought_or_over_the_limit():
    assert p_value_text(1e-9) == "p < 0.001"
    assert p_value_text(0.0496) == "p < 0.05"  # and not 0.050, beside a verdict
    assert p_value_text(0.0504) == "p = 0.050"
    assert p_value_text(1.0) == "p = 1.00"
