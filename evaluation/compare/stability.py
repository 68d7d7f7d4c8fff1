"""How calmly a run was trained: spikes of the loss, the spread of its last validations, its largest drop.

The rule for the word is stated in full by `RULE`; its limits are the constants of this module.

Example:
    >>> stability(train_losses, top1=curve(rows, "val", "top1"), val_loss=curve(rows, "val", "loss"))
    Stability(word='steady', reason='', num_spikes=0, …)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.compare.curves import Curve
from evaluation.text import count_text

# A spike: so many robust deviations above the median of the rows before it.
SPIKE_DEVIATIONS = 6.0
WINDOW_ROWS = 31
LEAST_ROWS = 10  # before these there is no usual level yet
LEAST_DEVIATION = (
    0.05  # of the median: where the loss hardly varies, little is no spike (as in train.loss_spike)
)
MOST_IN_A_ROW = 3  # more are a new level: another phase, another resolution
MAX_ROWS = 200_000  # looked at; the last ones of a longer run
ROBUST = 1.4826  # median absolute deviation → standard deviation of a normal distribution

LEAST_VALIDATIONS = 3
RESTLESS_SPIKES, UNSTABLE_SPIKES = 1, 3
RESTLESS_SKIPS, UNSTABLE_SKIPS = 4, 26  # of steps; fp16 skips a few while its scaler looks for its scale
RESTLESS_DEVIATION, UNSTABLE_DEVIATION = 0.01, 0.03  # of top-1, a fraction
RESTLESS_DROP, UNSTABLE_DROP = 0.05, 0.15

RULE = (
    f"“Unstable”: at least {UNSTABLE_SPIKES} loss spikes (of the rows, or counted by the run), or "
    f"{UNSTABLE_SKIPS} skipped steps, or a drop of top-1 by {100 * UNSTABLE_DROP:g} points between "
    f"validations, or a spread of {100 * UNSTABLE_DEVIATION:g} points about the trend of the last quarter. "
    f"“Restless”: {RESTLESS_SPIKES} spike, {RESTLESS_SKIPS} skipped steps, a drop by "
    f"{100 * RESTLESS_DROP:g} points, or a spread of {100 * RESTLESS_DEVIATION:g} point. “Steady”: none of "
    "these in three validations or more. A spread counts only where it is larger than the standard error "
    "that so few images give by chance, √(p (1 − p) / n)."
)


@dataclass(frozen=True)
class Stability:
    """Accuracies are fractions. None where there are too few rows to tell.

    Attributes:
        word: steady, restless or unstable, by RULE. reason: what made it so; empty for steady.
        num_spikes: training rows with a spike, see `loss_spikes`.
        top1_deviation, loss_deviation: standard deviation (n − 1) over the last quarter of the validations.
        top1_trend_deviation: of top-1 about its straight line there, so that a rise is no unrest.
        largest_drop: of top-1 from one validation to the next, 0 where it never fell; it came at
            largest_drop_epoch.
        num_last: validations in the last quarter.
    """

    word: str | None
    reason: str
    num_spikes: int | None
    top1_deviation: float | None
    top1_trend_deviation: float | None
    loss_deviation: float | None
    largest_drop: float | None
    largest_drop_epoch: float | None
    num_last: int


def stability(
    train_losses: NDArray[np.float64],
    top1: Curve,
    val_loss: Curve,
    num_images: int | None = None,
    run_spikes: int | None = None,
    skipped_steps: int | None = None,
) -> Stability:
    """All figures, and the word.

    Args:
        train_losses: of the training rows in order, shape (n,).
        num_images: of the validation split; None where it is not known, then chance is not allowed for.
        run_spikes, skipped_steps: as the run counted them itself.
    """
    num_spikes = int(loss_spikes(train_losses).sum()) if len(train_losses) > LEAST_ROWS else None
    last, last_loss = _last_quarter(top1.values), _last_quarter(val_loss.values)
    trend_deviation = None if last is None else _deviation_about_line(last)
    drops = top1.values[:-1] - top1.values[1:]
    worst = int(drops.argmax()) if last is not None else None
    largest_drop = None if worst is None else max(0.0, float(drops[worst]))
    chance = 0.0
    if last is not None and num_images:
        mean = float(np.clip(last.mean(), 0, 1))
        chance = math.sqrt(mean * (1 - mean) / num_images)
    word, reason = _judge(num_spikes, run_spikes, skipped_steps, largest_drop, trend_deviation, chance)
    return Stability(
        word=word,
        reason=reason,
        num_spikes=num_spikes,
        top1_deviation=None if last is None else float(last.std(ddof=1)),
        top1_trend_deviation=trend_deviation,
        loss_deviation=None if last_loss is None else float(last_loss.std(ddof=1)),
        largest_drop=largest_drop,
        largest_drop_epoch=float(top1.epochs[worst + 1]) if worst is not None and largest_drop else None,
        num_last=0 if last is None else len(last),
    )


def loss_spikes(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are spikes, bool of the shape of `losses` (n,).

    A row's loss is compared with the median of the WINDOW_ROWS before it, in robust standard deviations
    (1.4826 times the median absolute deviation, and at least 5% of the median). The first LEAST_ROWS are
    none. After MOST_IN_A_ROW of them the level that stays is taken for the usual one, as `train.loss_spike`
    does.
    """
    is_spike = np.zeros(len(losses), dtype=bool)
    begin = max(0, len(losses) - MAX_ROWS)
    level_begin, in_a_row = begin, 0
    for row in range(begin, len(losses)):
        before = losses[max(level_begin, row - WINDOW_ROWS) : row]
        if len(before) < LEAST_ROWS:
            continue
        median = float(np.median(before))
        deviation = max(ROBUST * float(np.median(np.abs(before - median))), LEAST_DEVIATION * abs(median))
        if losses[row] <= median + SPIKE_DEVIATIONS * deviation:
            in_a_row = 0
        elif in_a_row < MOST_IN_A_ROW:
            is_spike[row] = True
            in_a_row += 1
        else:
            level_begin, in_a_row = row, 0
    return is_spike


def _last_quarter(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The last quarter of the validations, at least three; None where there are fewer."""
    if len(values) < LEAST_VALIDATIONS:
        return None
    return values[-max(LEAST_VALIDATIONS, math.ceil(len(values) / 4)) :]


def _deviation_about_line(values: NDArray[np.float64]) -> float:
    """Standard deviation about the least-squares line (n − 2 degrees of freedom); values of shape (n ≥ "
    "3,)."""
    x = np.arange(len(values), dtype=np.float64)
    residuals = values - np.polyval(np.polyfit(x, values, 1), x)
    return float(np.sqrt((residuals**2).sum() / (len(values) - 2)))


def _judge(
    num_spikes: int | None,
    run_spikes: int | None,
    skipped_steps: int | None,
    largest_drop: float | None,
    deviation: float | None,
    chance: float,
) -> tuple[str | None, str]:
    """(the word, what made it so); (None, "") where there is too little to judge by."""
    spikes, skips = max(num_spikes or 0, run_spikes or 0), skipped_steps or 0
    drop, spread = largest_drop or 0.0, deviation or 0.0
    signs = [
        (spikes, RESTLESS_SPIKES, UNSTABLE_SPIKES, count_text(spikes, "loss spike")),
        (skips, RESTLESS_SKIPS, UNSTABLE_SKIPS, count_text(skips, "skipped step")),
        (drop, RESTLESS_DROP, UNSTABLE_DROP, f"top-1 fell by {100 * drop:.1f} points"),
        (
            spread if spread > chance else 0.0,
            RESTLESS_DEVIATION,
            UNSTABLE_DEVIATION,
            f"last validations spread by {100 * spread:.1f} points",
        ),
    ]
    reason = "; ".join(words for value, restless, _, words in signs if value >= restless)
    if any(value >= unstable for value, _, unstable, _ in signs):
        return "unstable", reason
    if reason:
        return "restless", reason
    return (None, "") if deviation is None else ("steady", "")
