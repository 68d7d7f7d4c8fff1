"""How figures are told: lines on the terminal, and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from train.data.preflight.figures import Figures, epoch_seconds, expected_rate, uncached_fraction
from train.tracking.console import duration

LABEL_WIDTH = 9


def say(label: str, line: str) -> None:
    """A line under its label, at once."""
    print(f"  {label:{LABEL_WIDTH}} {line}", flush=True)


def say_expected(figures: Figures, price_source: str | None) -> None:
    """What a training would do with these figures, where the model was measured."""
    for rates in figures.training:
        rate = expected_rate(figures, rates)
        if rate is None:
            return
        shared = ", as loader and model share the cores" if figures.shares_cores else ""
        say("expected", f"{rates.resolution} px: {rate:,.0f} images/s a {figures.unit}{shared} (estimated)")
    seconds, first = epoch_seconds(figures), epoch_seconds(figures, first=True)
    assert seconds is not None and first is not None
    line = f"{duration(seconds)} an epoch with its validation"
    if figures.usd_per_hour is not None:
        usd = seconds / 3600 * figures.usd_per_hour
        line += f", ${usd:,.2f}" if usd >= 0.1 else f", ${usd:.2g}"
        line += f" at ${figures.usd_per_hour:g} an hour ({price_source})"
    if figures.disk_images_per_second is not None and first > 1.1 * seconds:
        line += f"; the first one, read from the disk, {duration(first)}"
    say("expected", f"{line} (estimated)")


def as_json(figures: Figures) -> dict[str, Any]:
    """All figures and what follows from them; rates are of one rank, in images a second."""
    seconds, usd = epoch_seconds(figures), figures.usd_per_hour
    return {
        "uncached_fraction": uncached_fraction(figures),
        "expected_images_per_second_per_rank": {
            str(rates.resolution): expected_rate(figures, rates) for rates in figures.training
        },
        "epoch_seconds": seconds,
        "first_epoch_seconds": epoch_seconds(figures, first=True),
        "epoch_usd": None if usd is None or seconds is None else usd * seconds / 3600,
        **asdict(figures),
    }
