"""What was measured, and the rates that follow from it: pure functions.

Example:
    >>> expected_rate(figures, figures.training[0])
    1150.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.config import Recipe

CACHE_SHARE = 0.85  # of the usable memory; the rest is for the processes themselves


@dataclass(frozen=True)
class Rates:
    """What one rank was measured to do at one resolution, in images a second.

    Attributes:
        resolution: side in pixels.
        epochs: how many epochs of the run are at it.
        loader: the loader alone, shards in memory.
        model: the model alone, images on the device; None where it could not be measured.
    """

    resolution: int
    epochs: float
    loader: float
    model: float | None


@dataclass(frozen=True)
class Lever:
    """Something to change, and by what factor the loader would be faster.

    Attributes:
        change: what to type, as in "to prepare again with `--encode q90`".
        speedup: of the loader, estimated or measured as `evidence` says.
        is_estimate: the speed-up follows from that of decoding; else the loader itself was measured.
        bytes_ratio: size of the shards after it to that before.
    """

    change: str
    speedup: float
    evidence: str
    is_estimate: bool
    bytes_ratio: float = 1.0


@dataclass(frozen=True)
class Figures:
    """All that was found out; rates are those of one rank, sizes in bytes.

    Attributes:
        num_ranks: ranks on this machine; num_cores, num_workers: of each.
        shares_cores: the model computes on the cores that load (training on CPUs).
        training: one a resolution of the recipe; validation: of the other split, forward only.
        disk_images_per_second, disk_bytes_per_second: read cold, by all ranks together; None: not known.
        usable_ram_bytes: what the page cache can have on this machine; None: not known.
        levers: what would make loading faster, in the order in which to try it.
    """

    num_ranks: int
    num_cores: int
    num_workers: int
    shares_cores: bool
    num_train: int
    num_val: int
    validate_every_epochs: int
    data_bytes: int
    training: tuple[Rates, ...]
    validation: Rates | None = None
    usable_ram_bytes: int | None = None
    disk_images_per_second: float | None = None
    disk_bytes_per_second: float | None = None
    levers: tuple[Lever, ...] = ()
    usd_per_hour: float | None = None

    @property
    def cores_at_work(self) -> int:
        """Cores that a rank's loader uses."""
        return min(max(1, self.num_workers), self.num_cores)

    @property
    def unit(self) -> str:
        return "rank" if self.shares_cores else "GPU"


def training_resolutions(recipe: Recipe) -> list[int]:
    """Every resolution that a run trains at, ascending."""
    return sorted(epochs_by_resolution(recipe))


def epochs_by_resolution(recipe: Recipe) -> dict[int, float]:
    """Resolution in pixels → epochs trained at it; `data.resolution` is a number or {from_epoch: number}."""
    resolution: int | dict[int, int] = recipe.data.resolution
    if not isinstance(resolution, dict):
        return {int(resolution): float(recipe.num_epochs)}
    starts = sorted((float(start), int(side)) for start, side in resolution.items())
    ends = [start for start, _ in starts[1:]] + [float(recipe.num_epochs)]
    epochs: dict[int, float] = {}
    for number, ((start, side), end) in enumerate(zip(starts, ends, strict=True)):
        begin = start if number else 0.0
        length = min(end, recipe.num_epochs) - begin
        if length > 0:
            epochs[side] = epochs.get(side, 0.0) + length
    return epochs


def uncached_fraction(figures: Figures) -> float:
    """Share of the images that every epoch reads from the disk: 0 where the page cache holds all of them."""
    if figures.usable_ram_bytes is None or not figures.data_bytes:
        return 0.0
    room = CACHE_SHARE * figures.usable_ram_bytes
    return 0.0 if figures.data_bytes <= room else 1 - room / figures.data_bytes


def disk_rate(figures: Figures, uncached: float) -> float:
    """Images a second and rank that the disk allows, all ranks reading; infinite where nothing is read."""
    if not uncached or figures.disk_images_per_second is None:
        return math.inf
    return figures.disk_images_per_second / (figures.num_ranks * uncached)


def data_rate(figures: Figures, rates: Rates, uncached: float | None = None) -> float:
    """Images a second that reach a rank: a thread that waits for the disk decodes nothing meanwhile."""
    disk = disk_rate(figures, uncached_fraction(figures) if uncached is None else uncached)
    return in_turn(rates.loader, disk)


def expected_rate(figures: Figures, rates: Rates, uncached: float | None = None) -> float | None:
    """Images a second of one rank in training, estimated; None without the model's rate."""
    if rates.model is None:
        return None
    if not figures.shares_cores:
        return min(data_rate(figures, rates, uncached), rates.model)
    disk = disk_rate(figures, uncached_fraction(figures) if uncached is None else uncached)
    return min(in_turn(rates.loader, rates.model), disk)


def epoch_seconds(figures: Figures, first: bool = False) -> float | None:
    """Mean time of an epoch with its share of validation, estimated; `first`: everything is read cold."""
    uncached = 1.0 if first else None
    trained = figures.training[:1] if first else figures.training
    total_epochs = sum(rates.epochs for rates in trained)
    seconds = 0.0
    for rates in trained:
        rate = expected_rate(figures, rates, uncached)
        if rate is None:
            return None
        seconds += rates.epochs / total_epochs * figures.num_train / (rate * figures.num_ranks)
    if figures.validation is not None and (rate := expected_rate(figures, figures.validation)) is not None:
        seconds += figures.num_val / (rate * figures.num_ranks) / figures.validate_every_epochs
    return seconds


def in_turn(first: float, second: float) -> float:
    """Rate of two stages of which only one can be at work."""
    return 1 / (1 / first + 1 / second)
