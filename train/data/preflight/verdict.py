"""What limits a training, and what would change that: a sentence from measured figures, without measuring.

Example:
    >>> verdict(figures)
    'data-bound at 224 px: the model takes 2,400 images/s a GPU, the loader gives 1,150 with 4 cores: …'
"""

from __future__ import annotations

import math
from dataclasses import replace

from train.data.preflight.figures import (
    CACHE_SHARE,
    Figures,
    Lever,
    Rates,
    data_rate,
    disk_rate,
    expected_rate,
    in_turn,
    uncached_fraction,
)

BALANCED = 0.1  # of the time; differences below it are within what such short measurements can tell
MOSTLY = 0.6  # of the cores' time, where loader and model share them


def loading_matters(figures: Figures) -> bool:
    """Whether faster loading would shorten the training by more than a little."""
    now = with_instant_loading = 0.0
    for rates in figures.training:
        if (rate := expected_rate(figures, rates)) is None or rates.model is None:
            return False
        now += rates.epochs / rate
        with_instant_loading += rates.epochs / rates.model
    return now > (1 + BALANCED) * with_instant_loading


def verdict(figures: Figures) -> str:
    """One sentence: what limits the training, by which figures, and what would change it."""
    if any(rates.model is None for rates in figures.training):
        return "no verdict: without the model's speed nobody knows which of the two waits for the other"
    if figures.shares_cores:
        return _shared_verdict(figures)
    total = sum(rates.epochs / _expected(figures, rates) for rates in figures.training)
    worst = max(figures.training, key=lambda rates: (_lost(figures, rates), -_surplus(figures, rates)))
    lost = sum(_lost(figures, rates) for rates in figures.training) / total
    if lost > BALANCED:
        if disk_rate(figures, uncached_fraction(figures)) < worst.loader:
            return _disk_bound(figures, worst)
        return _data_bound(figures, worst)
    if _surplus(figures, worst) <= 1 + BALANCED:
        return _balanced(figures, worst, lost)
    return _model_bound(figures, worst)


def limit_of(sentence: str) -> str | None:
    """`"data-bound"` and the like from a verdict; None where there was none."""
    word = sentence.split(" ")[0]
    return word if word == "balanced" or word.endswith("-bound") else None


def quick_verdict(figures: Figures, model_fault: str | None) -> str:
    """The line at the start of a training, from one resolution; `model_fault`: why the model has no rate."""
    (rates,) = figures.training
    fits = uncached_fraction(figures) == 0
    cached = f"{size_in_words(figures.data_bytes)} of shards {'fit' if fits else 'do not fit'} the memory"
    loader = f"preflight: loader {rates.loader:,.0f} images/s"
    if rates.model is None:
        unknown = f"the model was not measured ({model_fault})"
        return f"{loader} at {rates.resolution} px on this rank, {unknown}; {cached}"
    known = f"{loader}, model {rates.model:,.0f} at {rates.resolution} px on this rank"
    if figures.shares_cores:
        together = in_turn(rates.loader, rates.model)
        known += f", which share its {_cores(figures.num_cores)}: about {together:,.0f} together"
    limit = limit_of(verdict(replace(figures, usable_ram_bytes=None)))  # no disk was measured
    more = "" if limit == "model-bound" else " (python -m train.data.preflight RECIPE says what to change)"
    return f"{known}: {limit}{more}; {cached}"


def size_in_words(num_bytes: float) -> str:
    """`84,000,000` → `84.0 MB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def _model(rates: Rates) -> float:
    assert rates.model is not None, "asked for only where the model was measured"
    return rates.model


def _expected(figures: Figures, rates: Rates) -> float:
    rate = expected_rate(figures, rates)
    assert rate is not None
    return rate


def _lost(figures: Figures, rates: Rates) -> float:
    """Time in which the model waits for data at this resolution, in seconds an image of an epoch."""
    return rates.epochs * max(0.0, 1 / data_rate(figures, rates) - 1 / _model(rates))


def _surplus(figures: Figures, rates: Rates) -> float:
    return data_rate(figures, rates) / _model(rates)


def _cores_needed(figures: Figures, rates: Rates) -> int:
    return math.ceil(_model(rates) * figures.cores_at_work / rates.loader - 1e-9)


def _at(figures: Figures, rates: Rates) -> str:
    if len(figures.training) == 1:
        return f"at {rates.resolution} px"
    epochs = sum(other.epochs for other in figures.training)
    return f"at {rates.resolution} px ({rates.epochs:g} of {epochs:g} epochs)"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _best(levers: tuple[Lever, ...], enough: float) -> list[Lever]:
    """The fastest loader, and the least way to prepare again that is fast enough, else the fastest."""
    measured = [lever for lever in levers if not lever.is_estimate and lever.speedup > 1]
    estimated = [lever for lever in levers if lever.is_estimate and lever.speedup > 1]
    best = [max(measured, key=lambda lever: lever.speedup)] if measured else []
    if estimated:
        fallback = max(estimated, key=lambda lever: lever.speedup)
        best.append(next((lever for lever in estimated if lever.speedup >= enough), fallback))
    return best


def _data_bound(figures: Figures, worst: Rates) -> str:
    model = _model(worst)
    needed = _cores_needed(figures, worst)
    closing: list[str] = []
    helping: list[str] = []
    if figures.num_workers < figures.num_cores:
        closes = needed <= figures.num_cores
        (closing if closes else helping).append(f"data.num_workers={figures.num_cores}, all that a rank has")
    if needed > figures.num_cores:
        more = needed - figures.num_cores
        closing.append(f"{more} more core{'s' * (more > 1)} a {figures.unit} (estimated)")
    for lever in _best(figures.levers, model / worst.loader):
        rate = worst.loader * lever.speedup
        told = f"{lever.change} ({lever.evidence}, so about {rate:,.0f} images/s)"
        (closing if rate >= model else helping).append(told)
    close = f"{' or '.join(closing)} would close it" if closing else ""
    help_ = f"{' or '.join(helping)} would help" if helping else ""
    return (
        f"data-bound {_at(figures, worst)}: the model takes {model:,.0f} images/s a {figures.unit}, the "
        f"loader gives {worst.loader:,.0f} with {_cores(figures.cores_at_work)}: "
        + "; ".join(filter(None, (close, help_)))
    )


def _disk_bound(figures: Figures, worst: Rates) -> str:
    uncached = uncached_fraction(figures)
    assert figures.disk_bytes_per_second is not None and figures.disk_images_per_second is not None
    image_bytes = figures.disk_bytes_per_second / figures.disk_images_per_second
    needed = _model(worst) * figures.num_ranks * uncached * image_bytes
    remedies = [
        f"{figures.data_bytes / CACHE_SHARE / 1e9:,.0f} GB of memory",
        f"a disk of {needed / 1e6:,.0f} MB/s (local NVMe)",
    ]
    for lever in figures.levers:
        if lever.bytes_ratio < 1:
            size = lever.bytes_ratio * figures.data_bytes
            fits = size <= CACHE_SHARE * (figures.usable_ram_bytes or 0)
            told = "which fits" if fits else "which is less to read"
            remedies.append(f"{lever.change} (about {size_in_words(size)}, {told})")
    return (
        f"disk-bound {_at(figures, worst)}: every epoch reads "
        f"{size_in_words(uncached * figures.data_bytes)} of {size_in_words(figures.data_bytes)}, which the "
        f"page cache cannot hold, from a disk that gives {figures.disk_bytes_per_second / 1e6:,.0f} MB/s, so "
        f"{data_rate(figures, worst):,.0f} images/s reach a {figures.unit} whose model takes "
        f"{_model(worst):,.0f}: {' or '.join(remedies)} would help (estimated)"
    )


def _balanced(figures: Figures, worst: Rates, lost: float) -> str:
    waits = f", and waiting for data costs {lost:.0%} of the time" if lost > 0.01 else ""
    return (
        f"balanced {_at(figures, worst)}: the model takes {_model(worst):,.0f} images/s a {figures.unit}, "
        f"the loader gives {data_rate(figures, worst):,.0f} with {_cores(figures.cores_at_work)}{waits}: a "
        f"faster {figures.unit} would need more cores with it"
    )


def _model_bound(figures: Figures, worst: Rates) -> str:
    needed = max(_cores_needed(figures, rates) for rates in figures.training)
    advice = (
        f"a cheaper machine with fewer cores ({needed} a {figures.unit} suffice, estimated) would do"
        if needed < figures.num_cores
        else f"faster data would change nothing, a faster {figures.unit} would"
    )
    return (
        f"model-bound {_at(figures, worst)}: the model takes {_model(worst):,.0f} images/s a {figures.unit}, "
        f"the loader could feed {_surplus(figures, worst):.1f} times that with "
        f"{_cores(figures.cores_at_work)}: {advice}"
    )


def _shared_verdict(figures: Figures) -> str:
    """Where the cores both load and compute, the question is which of the two has most of their time."""
    longest = max(figures.training, key=lambda rates: rates.epochs / _expected(figures, rates))
    both = in_turn(longest.loader, _model(longest))
    share = both / longest.loader
    known = (
        f"{_at(figures, longest)}: loader and model share {_cores(figures.num_cores)}; alone the loader "
        f"gives {longest.loader:,.0f} images/s and the model takes {_model(longest):,.0f}, together about "
        f"{both:,.0f}"
    )
    if _expected(figures, longest) < both / (1 + BALANCED):
        return _disk_bound(figures, longest)
    if share < 1 - MOSTLY:
        return (
            f"model-bound {known}, {1 - share:.0%} of the time for the model: a GPU, more cores or a smaller "
            "model would help, a faster loader would not"
        )
    remedies = ["more cores"]
    for lever in _best(figures.levers, math.inf):
        rate = in_turn(longest.loader * lever.speedup, _model(longest))
        remedies.append(f"{lever.change} ({lever.evidence}, so together about {rate:,.0f})")
    limit = "data-bound" if share > MOSTLY else "balanced"
    return f"{limit} {known}, {share:.0%} of the time for loading: {' or '.join(remedies)} would help"
