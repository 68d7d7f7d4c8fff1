"""Reading the curve of a learning-rate range test: the choice, its range, how sure it is, and a picture.

The rule: smooth the loss (a Gaussian over neighbouring steps), take `fraction_of_minimum` of the rate at its
minimum. A loss that hardly fell, or whose minimum is at an edge, gives no answer, and says so. How far the
choice could have been another is estimated from the curve itself: from its even and odd steps alone, and
from the smoothed curve with its own noise dealt anew.

Example:
    >>> result = judge(learning_rates, losses, fraction_of_minimum=1.0)
    >>> result.choice, result.choice_low, result.choice_high, result.confidence
    (0.42, 0.31, 0.55, 'high')
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from data_prep.storage import write_atomically

Confidence = Literal["high", "medium", "low"]

SMOOTHING_STEPS = 2.5  # standard deviation of the Gaussian
LEAST_FALL = 0.03  # of the first loss: less is noise
NUM_RESAMPLES = 200
# Depth of the minimum in deviations of the noise, and high : low of the range of choices.
HIGH_DEPTH, LOW_DEPTH = 10.0, 4.0
HIGH_RATIO, LOW_RATIO = 2.5, 8.0


@dataclass(frozen=True)
class LrFinderResult:
    """What the range test found.

    Attributes:
        learning_rates, losses: the curve, losses averaged over ranks; rates are the head's, of which other
            parameter groups have their share.
        choice: the rate by the rule, or None.
        reason: how it was chosen, or why not.
        choice_low, choice_high: the range within which the choice moves with the noise, or None.
        confidence, confidence_reason: how much to make of the choice, and why.
    """

    learning_rates: list[float]
    losses: list[float]
    choice: float | None
    reason: str
    choice_low: float | None = None
    choice_high: float | None = None
    confidence: Confidence = "low"
    confidence_reason: str = ""


def judge(learning_rates: list[float], losses: list[float], fraction_of_minimum: float) -> LrFinderResult:
    """Choice, range and confidence for a curve of finite losses."""
    choice, reason = choose_learning_rate(learning_rates, losses, fraction_of_minimum)
    if choice is None:
        return LrFinderResult(learning_rates, losses, None, reason, confidence_reason="there is no choice")
    smooth = smooth_losses(losses)
    lowest = int(np.argmin(smooth))
    residuals = (np.asarray(losses) - smooth)[: max(lowest + 1, 10)]  # what diverges later is no noise
    low, high = _choice_range(learning_rates, losses, smooth, residuals, fraction_of_minimum)
    depth = float((smooth[0] - smooth[lowest]) / max(residuals.std(), 1e-12))
    confidence, why = _confidence(depth, high / low, at_edge=lowest == len(losses) - 1)
    return LrFinderResult(learning_rates, losses, choice, reason, low, high, confidence, why)


def choose_learning_rate(
    learning_rates: list[float], losses: list[float], fraction_of_minimum: float
) -> tuple[float | None, str]:
    """Apply the module's rule to a curve of finite losses; the rate or None, and the reason."""
    if len(losses) < 10:
        return None, f"the loss diverged after {len(losses)} steps: set lr_finder.start_lr lower"
    smooth = smooth_losses(losses)
    lowest = int(np.argmin(smooth))
    fall = (smooth[0] - smooth[lowest]) / abs(smooth[0])
    if fall < LEAST_FALL:
        return None, f"no clear minimum: the loss fell by {fall:.1%} only"
    if lowest == 0:
        return None, "no clear minimum: the loss was lowest at the first rate"
    choice = learning_rates[lowest] * fraction_of_minimum
    reason = f"{fraction_of_minimum:g} × the rate of the lowest loss ({learning_rates[lowest]:.3g})"
    if lowest == len(losses) - 1:
        reason += "; the loss was still falling at the end, so more may be better"
    return choice, f"{reason}; the loss fell by {fall:.0%}"


def _choice_range(
    learning_rates: list[float],
    losses: list[float],
    smooth: np.ndarray,
    residuals: np.ndarray,
    fraction_of_minimum: float,
) -> tuple[float, float]:
    """Lowest and highest choice: by the rule, by every second point, and nine tenths of the resampled curves.

    The generator is seeded, so that a curve has one range.
    """
    choices = [learning_rates[int(np.argmin(smooth))]]
    for start in (0, 1):
        half = smooth_losses(losses[start::2], SMOOTHING_STEPS / 2)
        choices.append(learning_rates[start::2][int(np.argmin(half))])
    generator = np.random.default_rng(0)
    noise = generator.choice(residuals, (NUM_RESAMPLES, len(losses)))
    lowest = np.argmin((smooth + noise) @ _smoothing_weights(len(losses), SMOOTHING_STEPS).T, axis=1)
    choices += np.quantile(np.asarray(learning_rates)[lowest], [0.05, 0.95]).tolist()
    return min(choices) * fraction_of_minimum, max(choices) * fraction_of_minimum


def _confidence(depth: float, ratio: float, at_edge: bool) -> tuple[Confidence, str]:
    """How sure a choice is, and why, in words.

    Args:
        depth: of the minimum, in standard deviations of the loss about the smoothed curve.
        ratio: of the highest to the lowest choice.
    """
    facts = f"the fall is {depth:.0f} times the noise, and the choice moves within a factor of {ratio:.2g}"
    if at_edge:
        return "low", f"the minimum is at the last rate of the test; {facts}"
    if depth < LOW_DEPTH or ratio > LOW_RATIO:
        return "low", facts
    return ("high" if depth >= HIGH_DEPTH and ratio <= HIGH_RATIO else "medium"), facts


def smooth_losses(losses: list[float], width: float = SMOOTHING_STEPS) -> np.ndarray:
    """Gaussian-weighted mean of neighbouring steps, weights cut at the ends: shape (num_steps,)."""
    return _smoothing_weights(len(losses), width) @ np.asarray(losses)


def _smoothing_weights(num_steps: int, width: float) -> np.ndarray:
    steps = np.arange(num_steps)
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / width) ** 2)
    return weights / weights.sum(1, keepdims=True)


def save_result(result: LrFinderResult, folder: Path, chosen: float) -> None:
    """Write `lr_finder.json` and `lr_finder.png`; `chosen` is the rate that the run trains with."""
    content = asdict(result) | {"trained_with": chosen}
    write_atomically(folder / "lr_finder.json", (json.dumps(content, indent=1) + "\n").encode())
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.learning_rates, result.losses, color="0.75", lw=1, label="loss of a step")
    if result.losses:
        smooth = smooth_losses(result.losses)
        axes.plot(result.learning_rates, smooth, color="#0072B2", lw=2, label="smoothed")
        low, high = min(result.losses), result.losses[0]
        axes.set_ylim(low - 0.15 * (high - low + 0.1), high + 0.6 * (high - low + 0.1))
    if result.choice_low is not None and result.choice_high is not None:
        label = f"range of the choice: {result.choice_low:.2g}–{result.choice_high:.2g} ({result.confidence})"
        axes.axvspan(result.choice_low, result.choice_high, color="#E69F00", alpha=0.18, lw=0, label=label)
    axes.axvline(chosen, color="#D55E00", lw=2, ls="--", label=f"peak_lr of this run: {chosen:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning-rate finder")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(folder / "lr_finder.png", buffer.getvalue())
