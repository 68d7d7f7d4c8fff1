"""What all loaders share: which samples, crops and flips a rank gets, and whether their bytes are intact."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_prep.manifest import Manifest, check_size, load_index, load_keys
from train.config import DataSection, ValidationSection
from train.data.augment import Augmentation
from train.data.batch import Batch
from train.data.folds import FoldPart, fold_part
from train.data.order import epoch_order, rank_micro_batches, rank_validation_batches
from train.data.samples import Damage, Request, SampleFetcher, SampleReader
from train.distributed import Ranks

DRAWN_AT_ONCE = 4096  # samples whose crops are drawn together
MAX_REPORTS = 5


@dataclass(frozen=True)
class Decoded:
    """What a backend makes of a request.

    Attributes:
        images: uint8, shape (n, resolution, resolution, 3).
        sample_ids: int64, shape (n,): of the request, but for damaged samples (see `SampleFetcher`).
        damaged, changed_shards: as in `Fetched`.
    """

    images: torch.Tensor
    sample_ids: np.ndarray
    damaged: tuple[Damage, ...] = ()
    changed_shards: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoaderPlan:
    """Everything that decides what a loader yields, but for the backend that decodes it."""

    folder: Path
    manifest: Manifest
    split: Literal["train", "val"]
    is_training: bool  # shuffled, cropped at random; else in order, whole, centre crops
    seed: int
    rank: int
    world_size: int
    num_workers: int
    pin_memory: bool
    batch_size: int  # of this rank's batches
    augmentation: Augmentation
    global_batch_size: int = 0  # training only
    grad_accum_steps: int = 1
    check_bytes: Literal["first_epoch", "every_epoch", "never"] = "first_epoch"
    max_damaged_fraction: float = 0.001
    timeout_seconds: float = 300.0
    fold: FoldPart | None = None  # the part of the split that is walked through; None: all of it

    @classmethod
    def training(
        cls, folder: Path, manifest: Manifest, data: DataSection, seed: int, ranks: Ranks
    ) -> LoaderPlan:
        """The training split as a recipe's `data` section wants it."""
        return cls(
            folder=folder,
            manifest=manifest,
            split="train",
            is_training=True,
            seed=seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=ranks.num_cores if data.num_workers is None else data.num_workers,
            pin_memory=ranks.device.type == "cuda",
            batch_size=data.global_batch_size // (ranks.world_size * data.accum_steps),
            global_batch_size=data.global_batch_size,
            grad_accum_steps=data.accum_steps,
            augmentation=Augmentation(True, seed, data.crop_scale, data.crop_aspect, data.horizontal_flip),
            check_bytes=data.check_bytes,
            max_damaged_fraction=data.max_damaged_fraction,
            timeout_seconds=data.timeout_seconds,
            fold=fold_part(data, is_held_out=False),
        )

    @classmethod
    def held_out(
        cls, folder: Path, manifest: Manifest, validation: ValidationSection, data: DataSection, ranks: Ranks
    ) -> LoaderPlan:
        """What a training with this `data` section is validated on: the val split, or its fold."""
        fold = fold_part(data, is_held_out=True)
        split: Literal["train", "val"] = "val" if fold is None else "train"
        return replace(cls.validation(folder, manifest, validation, data, ranks, split), fold=fold)

    @classmethod
    def validation(
        cls,
        folder: Path,
        manifest: Manifest,
        validation: ValidationSection,
        data: DataSection,
        ranks: Ranks,
        split: Literal["train", "val"] = "val",
    ) -> LoaderPlan:
        """A split whole and in order, in centre crops."""
        return cls(
            folder=folder,
            manifest=manifest,
            split=split,
            is_training=False,
            seed=0,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=ranks.num_cores if data.num_workers is None else data.num_workers,
            pin_memory=ranks.device.type == "cuda",
            batch_size=validation.batch_size,
            augmentation=Augmentation(is_random=False, crop_ratio=validation.crop_ratio),
            check_bytes=data.check_bytes,
            max_damaged_fraction=data.max_damaged_fraction,
            timeout_seconds=data.timeout_seconds,
        )


class Loader(ABC):
    """Batches of one split, or of a part of it, for one rank.

    Attributes:
        sample_ids: what it walks through, int64, ascending: all ids of the split, or those of its fold.
        damaged: the samples that this rank could not use so far, each with the reason. In training they were
            replaced, in validation left out.
        num_left_out: how many samples the last validation epoch left out on this rank.

    Raises (on construction):
        ValueError: shards or index are missing or have not the size that the manifest says.
    """

    def __init__(self, plan: LoaderPlan) -> None:
        self.plan = plan
        # In memory, not mapped: labels and places must not change when the file does.
        self.index = np.array(load_index(plan.folder, plan.manifest, plan.split))
        self.shards = [plan.folder / shard.name for shard in plan.manifest.splits[plan.split].shards]
        for path, entry in zip(self.shards, plan.manifest.splits[plan.split].shards, strict=True):
            check_size(path, entry)
        self.damaged: dict[int, str] = {}
        self.num_left_out = 0
        fold = plan.fold
        labels = self.index["label"]
        self.sample_ids = np.arange(len(labels)) if fold is None else fold.sample_ids(labels)
        self.reader = SampleReader(self.shards, self.index)
        # Of the same part: what stands in for a damaged sample must not come out of the fold held out.
        self.fetcher = SampleFetcher(self.reader, plan.augmentation, self.sample_ids)
        self._checked = np.zeros(len(self.index), bool)  # whose bytes were compared with the index
        self._changed_shards: set[int] = set()
        self._keys: list[str] | None = None
        self._running: Generator[Decoded] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the split, or of its part, over all ranks."""
        return len(self.sample_ids)

    def epoch(self, epoch: int, start_sample: int = 0, *, resolution: int) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch.

        Left early, it frees what the epoch held, as does another epoch that begins; `close` frees the rest.

        Args:
            epoch: decides order, crops and flips; without effect on a validation split.
            start_sample: samples of this epoch that all ranks together have consumed; found in O(1).
            resolution: side of the images in pixels.

        Raises:
            RuntimeError: no batch came for `timeout_seconds`, or nothing intact could be read.
        """
        self._end_epoch()
        batches = self._batches(epoch, start_sample)
        self.num_left_out = 0
        if not batches:
            return
        if self.plan.check_bytes == "every_epoch":
            self._checked[:] = False
        decoded = self._running = self._decode(batches, self._requests(batches, epoch, resolution))
        try:
            for item in decoded:
                self._checked[item.sample_ids] = True
                self._report(item)
                if len(item.sample_ids):
                    labels = torch.from_numpy(self.index["label"][item.sample_ids].astype(np.int64))
                    yield Batch(item.images, labels, torch.from_numpy(item.sample_ids))
                if self._running is not decoded:
                    raise RuntimeError(
                        f"epoch {epoch} goes no further: another epoch of this loader began, or it was closed"
                    )
        finally:
            if self._running is decoded:
                self._end_epoch()

    def _end_epoch(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _batches(self, epoch: int, start_sample: int) -> list[np.ndarray]:
        """Sample ids of this rank's batches."""
        plan = self.plan
        if not plan.is_training:
            batches = rank_validation_batches(self.num_samples, plan.batch_size, plan.rank, plan.world_size)
            return [self.sample_ids[places] for places in batches]
        return rank_micro_batches(
            self.sample_ids[epoch_order(plan.seed, epoch, self.num_samples)],
            start_sample,
            plan.global_batch_size,
            plan.grad_accum_steps,
            plan.rank,
            plan.world_size,
        )

    def _requests(self, batches: list[np.ndarray], epoch: int, resolution: int) -> Iterator[Request]:
        """A request a batch, drawn some batches at a time: in numpy, small arrays cost most."""
        num_batches = max(1, DRAWN_AT_ONCE // max(1, len(batches[0])))
        for start in range(0, len(batches), num_batches):
            some = batches[start : start + num_batches]
            ids = np.concatenate(some)
            boxes, flips = self.plan.augmentation.boxes_and_flips(
                epoch, ids, self.index["width"][ids], self.index["height"][ids]
            )
            position = 0
            for batch in some:
                part = slice(position, position + len(batch))
                position += len(batch)
                unchecked = np.zeros(len(batch), bool)
                if self.plan.check_bytes != "never":
                    unchecked = ~self._checked[batch]
                yield Request(epoch, batch, boxes[part], flips[part], unchecked, resolution)

    def _report(self, item: Decoded) -> None:
        """Count what was damaged; say the first ones, and which files changed."""
        if not self.plan.is_training:
            self.num_left_out += len(item.damaged)
        for sample_id, reason in item.damaged:
            if sample_id in self.damaged:
                continue
            self.damaged[sample_id] = reason
            if len(self.damaged) <= MAX_REPORTS:
                instead = "another is taken in its place" if self.plan.is_training else "it is left out"
                self._say(f"{self.describe(sample_id)} is damaged: {reason}; {instead}")
            elif len(self.damaged) == MAX_REPORTS + 1:
                self._say("more samples are damaged; they are counted, and listed in damaged.jsonl")
        for shard in set(item.changed_shards) - self._changed_shards:
            self._changed_shards.add(shard)
            self._say(
                f"{self.shards[shard]} was changed while this job is running: every sample of it is checked "
                "from now on"
            )

    def _say(self, words: str) -> None:
        print(f"rank {self.plan.rank}: {words}", file=sys.stderr, flush=True)

    def describe(self, sample_id: int) -> str:
        """`sample 17 (train/n01440764/a.JPEG) in data/train.beton`."""
        place = self.place(sample_id)
        return f"sample {sample_id} ({place['key']}) in {place['shard']}"

    def place(self, sample_id: int) -> dict[str, str]:
        """Source key and shard of a sample."""
        if self._keys is None:
            self._keys = load_keys(self.plan.folder, self.plan.manifest, self.plan.split)
        return {"key": self._keys[sample_id], "shard": str(self.shards[self.index["shard"][sample_id]])}

    def where(self, doing: str) -> str:
        """What a watchdog says: the sample that is being read, or else what the backend does."""
        return self.reading_or(doing, self.reader.position)

    def reading_or(self, doing: str, sample_id: int) -> str:
        """`reading sample 17 in data/train.beton`; what else is done where no sample is read, -1."""
        # Without its key: that is in a file on the same disk, which may be stuck.
        if sample_id < 0:
            return doing
        return f"reading sample {sample_id} in {self.shards[self.index['shard'][sample_id]]}"

    def close(self) -> None:
        """Free threads, processes and files; may be called twice."""
        self._end_epoch()
        self.reader.close()

    @abstractmethod
    def _decode(self, batches: list[np.ndarray], requests: Iterator[Request]) -> Generator[Decoded]:
        """A result for each of the requests, in their order.

        Args:
            batches: the ids that the requests will ask for, known beforehand.
            requests: taken one after the other, from any one thread.
        """
