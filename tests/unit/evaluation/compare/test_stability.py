from __future__ import annotations

import numpy as np
import pytest

from evaluation.compare.curves import Curve, curve, smoothed
from evaluation.compare.stability import RULE, loss_spikes, stability

NOTHING = Curve(np.array([]), np.array([]))


def over_epochs(values):
    return Curve(np.arange(1.0, len(values) + 1), np.array(values, dtype=float))


def judged(top1, losses=(), **more):
    return stability(np.array(losses, dtype=float), over_epochs(top1), NOTHING, **more)


def falling(num_rows=100):
    """A loss with a little noise, as training has it."""
    return 2.0 * np.exp(-np.arange(num_rows) / 60) + np.random.default_rng(0).normal(0, 0.02, num_rows)


def test_a_falling_loss_has_no_spikes():
    assert loss_spikes(falling()).sum() == 0


def test_single_rows_far_above_their_past_are_spikes():
    losses = falling()
    losses[[40, 70]] += 3
    assert np.flatnonzero(loss_spikes(losses)).tolist() == [40, 70]


def test_a_level_that_stays_is_three_spikes_and_then_the_usual():
    losses = np.concatenate([np.full(40, 1.0), np.full(40, 3.0)])
    assert np.flatnonzero(loss_spikes(losses)).tolist() == [40, 41, 42]
    losses[55] = 9  # a spike of the new level, twelve rows after it became the usual one
    assert np.flatnonzero(loss_spikes(losses)).tolist() == [40, 41, 42, 55]


def test_a_flat_loss_makes_no_spike_of_next_to_nothing():
    losses = np.full(50, 1.0)
    losses[30] = 1.2  # 20% above: four times the least deviation of 5%, six are needed
    assert loss_spikes(losses).sum() == 0
    losses[30] = 1.31
    assert loss_spikes(losses).sum() == 1


def test_the_first_rows_have_no_past():
    losses = np.full(30, 1.0)
    losses[[2, 9]] = 50
    assert loss_spikes(losses).sum() == 0


def test_figures_of_the_last_quarter_by_hand():
    top1 = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.70, 0.72, 0.71, 0.70, 0.74]
    found = stability(np.array([]), over_epochs(top1), over_epochs([2.0] * 9 + [1.0, 1.2, 1.4]))
    assert found.num_last == 3  # a quarter of twelve
    assert found.top1_deviation == pytest.approx(np.std([0.71, 0.70, 0.74], ddof=1))
    assert found.loss_deviation == pytest.approx(0.2)
    # About the line through them: residuals 1/120, −2/120, 1/120 times 1, one degree of freedom left.
    residual = (0.71 - 2 * 0.70 + 0.74) / 6
    assert found.top1_trend_deviation == pytest.approx(np.sqrt(6 * residual**2))
    assert found.largest_drop == pytest.approx(0.01)
    assert found.num_spikes is None  # there are no training rows


def test_the_quarter_is_at_least_three_validations():
    assert judged([0.1, 0.2, 0.3, 0.4]).num_last == 3
    assert judged([0.1, 0.2]).top1_deviation is None
    assert judged(np.linspace(0, 0.5, 17)).num_last == 5


def test_a_steady_rise_is_steady():
    found = judged([0.2, 0.4, 0.6, 0.8], falling())
    assert (found.word, found.reason, found.largest_drop, found.largest_drop_epoch) == ("steady", "", 0, None)
    assert found.top1_deviation > 0.1  # it rises, and is no unrest


@pytest.mark.parametrize(
    ("top1", "more", "word", "reason"),
    [
        ([0.2, 0.5, 0.44, 0.6, 0.61, 0.62], {}, "restless", "top-1 fell by 6.0 points"),
        ([0.2, 0.5, 0.30, 0.6, 0.61, 0.62], {}, "unstable", "top-1 fell by 20.0 points"),
        ([0.5, 0.5, 0.50, 0.5, 0.52, 0.50], {}, "restless", "spread by 1.6 points"),
        ([0.5, 0.5, 0.50, 0.5, 0.55, 0.51], {}, "unstable", "spread by 3.7 points"),
        ([0.5] * 6, {"run_spikes": 1}, "restless", "1 loss spike"),
        ([0.5] * 6, {"run_spikes": 3}, "unstable", "3 loss spikes"),
        ([0.5] * 6, {"skipped_steps": 3}, "steady", ""),
        ([0.5] * 6, {"skipped_steps": 4}, "restless", "4 skipped steps"),
        ([0.5] * 6, {"skipped_steps": 26}, "unstable", "26 skipped steps"),
    ],
)
def test_the_word_follows_the_rule(top1, more, word, reason):
    found = judged(top1, **more)
    assert found.word == word
    assert reason in found.reason


def test_a_spread_that_few_images_give_by_chance_is_no_unrest():
    top1 = [0.5, 0.5, 0.50, 0.5, 0.52, 0.50]
    assert judged(top1, num_images=100_000).word == "restless"
    assert judged(top1, num_images=100).word == "steady"  # standard error 5 points


def test_nothing_to_judge_by_is_no_word():
    assert judged([]).word is None
    assert judged([0.5]).word is None


def test_the_rule_names_its_limits():
    for limit in (
        "at least 3 loss spikes",
        "26 skipped steps",
        "15 points",
        "3 points",
        "1 spike",
        "5 points",
    ):
        assert limit in RULE


def test_curve_takes_the_later_row_and_passes_over_what_is_no_number():
    rows = [
        {"split": "val", "epoch": 2, "top1": 0.9},
        {"split": "val", "epoch": 1, "top1": 0.1},
        {"split": "val", "epoch": 1, "top1": 0.2},
        {"split": "val:224", "epoch": 1, "top1": 0.5},
        {"split": "val", "epoch": 3, "top1": None},
        {"split": "val", "epoch": "four", "top1": 0.5},
        {"split": "val", "epoch": 5, "top1": float("nan")},
        {"split": "val", "epoch": 6, "top1": 7.5},
        {"split": "val", "epoch": 1e300, "top1": 0.5},
        {"split": "val", "epoch": -1, "top1": 0.5},
    ]
    found = curve(rows, "val", "top1")
    assert (found.epochs.tolist(), found.values.tolist()) == ([1, 2], [0.2, 0.9])


def test_smoothing_keeps_a_constant_and_its_ends():
    assert smoothed(np.full(10, 2.0), 5) == pytest.approx(np.full(10, 2.0))
    assert smoothed(np.array([0.0, 3.0, 3.0]), 50) == pytest.approx([1.5, 2, 3])
