"""What the parts of a running `prepare` share: options, the order of a split, the allowance for bad files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.corrections import LABEL_AUDIT
from data_prep.journal import Journal
from data_prep.manifest import ImageSettings
from data_prep.normalize import NormalizedImage
from data_prep.sources import Sample
from data_prep.storage import Folder
from data_prep.workers import Job, Workers

STATISTICS_IMAGES = 2000  # at least so many training images (or all) give the channel mean and std
UNITS_WINDOW = 2048  # samples of whole units that are shuffled among each other


Range = tuple[str, int, int]  # split, from, to (not included)


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is told; see `python -m data_prep prepare --help`.

    Attributes:
        out: folder or `s3://bucket/prefix`.
        shard_bytes: size of a tar shard, about.
        rank, world_size: of the process, where several divide the tars among them.
    """

    out: Path | str
    format: Literal["ffcv", "dali"] = "ffcv"
    images: ImageSettings = field(default_factory=ImageSettings)
    seed: int = 0
    num_workers: int = 0  # 0: one a core
    max_bad_fraction: float = 0.05
    shard_bytes: int = 256 << 20
    progress: bool = True
    rank: int = 0
    world_size: int = 1


class BadFiles:
    """Counts files that cannot be used and ends the job when there are too many of them."""

    def __init__(self, num_found: int, max_fraction: float) -> None:
        self._allowed, self._max_fraction = math.ceil(max_fraction * num_found), max_fraction
        self._reasons: Counter[str] = Counter()

    def add(self, lines: Sequence[dict[str, str]]) -> None:
        """ValueError: too many by now; one allowance for the whole source, so a hopeless one ends soon."""
        # What somebody looked at and left out is no sign of a hopeless source.
        lines = [line for line in lines if line["reason"] != LABEL_AUDIT]
        self._reasons.update(line["reason"] for line in lines)
        if lines and self._reasons.total() > self._allowed:
            listing = "; ".join(f"{count} × {reason}" for reason, count in self._reasons.most_common(3))
            raise ValueError(
                f"too many files cannot be used (--max-bad-fraction {self._max_fraction}): {listing}"
                f"; the last was {lines[-1]['key']!r}. Mend the source, or allow more"
            )


@dataclass
class Work:
    """A running `prepare`."""

    folder: Folder
    options: PrepareOptions
    journal: Journal
    workers: Workers
    bad_files: BadFiles
    still_ours: Callable[[], None]  # RuntimeError where another writer has taken the folder over

    def normalized(
        self, ranges: Sequence[Range], orders: dict[str, list[Sample]]
    ) -> Iterator[tuple[int, Sample, NormalizedImage | str]]:
        """(position, sample, image or reason) for ranges of the splits' orders, one after the other."""

        def places() -> Iterator[tuple[str, int]]:
            return ((split, position) for split, start, stop in ranges for position in range(start, stop))

        # A multiple of it gives its statistics; the validation images give none.
        stride = max(1, len(orders["train"]) // STATISTICS_IMAGES) if "train" in orders else 1
        jobs = (Job(orders[split][p], split == "train" and p % stride == 0) for split, p in places())
        for (split, position), result in zip(places(), self.workers.normalized(jobs), strict=True):
            yield position, orders[split][position], result


def order_of(split: str, samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The order of a split on the disk: seeded and random for `train`, so that a reader in order sees all.

    Samples that are read in units (row groups of parquet) are shuffled by unit, and then within windows of
    about UNITS_WINDOW samples, so that every unit is read about once and not once a sample.
    """
    if split != "train":
        return list(samples)
    generator = np.random.default_rng([seed, 0])
    if samples[0].blob.unit is None:
        return [samples[position] for position in generator.permutation(len(samples))]
    units: dict[object, list[Sample]] = {}
    for sample in samples:
        units.setdefault(sample.blob.unit, []).append(sample)
    groups = list(units.values())
    order: list[Sample] = []
    window: list[Sample] = []
    for number in generator.permutation(len(groups)):
        window += groups[number]
        if len(window) >= UNITS_WINDOW:
            order += [window[position] for position in generator.permutation(len(window))]
            window = []
    return order + [window[position] for position in generator.permutation(len(window))]
