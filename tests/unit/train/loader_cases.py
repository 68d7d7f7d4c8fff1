"""What the tests of the loaders share: the backends, plans, and what a loader yielded."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from data_prep.manifest import Manifest
from train.config import DataSection, ValidationSection
from train.data.loaders import Loader, LoaderPlan, build_loader
from train.data.samples import SampleReader
from train.distributed import Ranks

SEED = 5
NUM_TRAIN, NUM_VAL = 160, 43  # of the fixture `prepared`
GLOBAL_BATCH_SIZE = 16  # divides the training split: an epoch holds every sample
PATIENCE: dict[str, Any] = {"timeout_seconds": 60.0}  # a loader that hangs fails its test soon


@dataclass(frozen=True)
class Case:
    """A backend and its workers."""

    backend: str
    num_workers: int = 0


CASES = [
    pytest.param(Case("reference"), id="reference"),
    pytest.param(Case("reference", num_workers=2), id="reference-workers"),
    pytest.param(Case("ffcv"), marks=pytest.mark.ffcv, id="ffcv"),
    pytest.param(Case("dali"), marks=pytest.mark.dali, id="dali"),
]


def long_but(*short: str) -> list[ParameterSet]:
    """The cases; only those with these names run in CI."""
    return [
        case
        if case.id in short
        else pytest.param(*case.values, marks=[*case.marks, pytest.mark.long], id=case.id)
        for case in CASES
    ]


def training(
    folder: Path, manifest: Manifest, case: Case, rank: int = 0, world_size: int = 1, **changes: Any
) -> LoaderPlan:
    data = DataSection(path=folder, global_batch_size=GLOBAL_BATCH_SIZE, num_workers=case.num_workers)
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"), 1)
    return replace(LoaderPlan.training(folder, manifest, data, SEED, ranks), **PATIENCE | changes)


def validation(
    folder: Path,
    manifest: Manifest,
    case: Case,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 10,
    **changes: Any,
) -> LoaderPlan:
    data = DataSection(path=folder, num_workers=case.num_workers)
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"), 1)
    section = ValidationSection(batch_size=batch_size)
    return replace(LoaderPlan.validation(folder, manifest, section, data, ranks), **PATIENCE | changes)


@dataclass(frozen=True)
class Seen:
    """All that a loader yielded, copied, sample by sample."""

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    @property
    def by_id(self) -> dict[int, np.ndarray]:
        return dict(zip(self.ids.tolist(), self.images, strict=True))


def consume(loader: Loader, epoch: int = 0, start_sample: int = 0, resolution: int = 32) -> Seen:
    batches = list(loader.epoch(epoch, start_sample, resolution=resolution))
    for batch in batches:
        assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
        assert batch.images.shape == (len(batch.labels), resolution, resolution, 3)
    if not batches:
        empty = np.zeros(0, np.int64)
        return Seen(empty, empty, np.zeros((0, resolution, resolution, 3), np.uint8))
    return Seen(
        *(
            torch.cat(parts).numpy().copy()
            for parts in (
                [batch.sample_ids for batch in batches],
                [batch.labels for batch in batches],
                [batch.images for batch in batches],
            )
        )
    )


def read(case: Case, plan: LoaderPlan, epoch: int = 0, start_sample: int = 0, resolution: int = 32) -> Seen:
    """One epoch of a loader that is built for it."""
    loader = build_loader(case.backend, plan)
    try:
        return consume(loader, epoch, start_sample, resolution)
    finally:
        loader.close()


def same(one: Seen, other: Seen) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in ((one.ids, other.ids), (one.labels, other.labels), (one.images, other.images))
    )


class ForgetfulReader(SampleReader):
    """Sees no file change, as where a disk loses bytes by itself. Put in place by `read_with`."""

    def has_changed(self, shard: int) -> bool:
        return False


class UnreadableReader(SampleReader):
    """A disk with two bad places."""

    samples = (8, 9)

    def _file(self, shard: int) -> int:
        if self.position in self.samples:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._file(shard)


class StuckReader(SampleReader):
    """A disk that does not answer to reads of one sample, until it is `released`, in this process."""

    sample = 17
    released = threading.Event()

    def _file(self, shard: int) -> int:
        if self.position == self.sample:
            self.released.wait()
        return super()._file(shard)


class BrokenReader(SampleReader):
    """Has a bug."""

    def read(self, sample_id: int) -> bytes:
        raise ZeroDivisionError("surprise")


class PickyReader(SampleReader):
    """Takes no sample for intact that it checks."""

    def fault(self, sample_id: int, content: bytes | OSError, check: bool) -> str | None:
        return "it is not to my taste" if check else None


class UntracedPickyReader(ForgetfulReader, PickyReader):
    """Lets unchecked bytes pass, and has nothing to replace them with."""


def read_with(loader: Loader, reader: type[SampleReader]) -> Loader:
    """Let a loader, and its workers of now on, read with this kind of reader."""
    loader.reader.__class__ = reader
    return loader
