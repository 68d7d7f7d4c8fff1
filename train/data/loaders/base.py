"""What all loaders share: which samples, crops and flips a rank gets, and whether their bytes are intact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_prep.manifest import Manifest, check_size, load_index, load_keys
from data_prep.storage import crc32c
from train.config import DataSection, ValidationSection
from train.data.augment import center_crops, random_flips, random_resized_crops
from train.data.batch import Batch
from train.data.order import epoch_order, rank_micro_batches, rank_validation_batches
from train.distributed import Ranks


@dataclass(frozen=True)
class Request:
    """What is to be decoded for one batch.

    Attributes:
        sample_ids: int64, shape (n,).
        boxes: int32, shape (n, 4): top, left, height, width in pixels of the stored image.
        flips: bool, shape (n,).
        resolution: side of the result in pixels.
    """

    sample_ids: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    resolution: int


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
    global_batch_size: int = 0  # training only
    grad_accum_steps: int = 1
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_aspect: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: bool = False
    crop_ratio: float = 1.0  # validation only

    @classmethod
    def training(
        cls, folder: Path, manifest: Manifest, data: DataSection, seed: int, ranks: Ranks
    ) -> LoaderPlan:
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
            batch_size=data.global_batch_size // (ranks.world_size * data.grad_accum_steps),
            global_batch_size=data.global_batch_size,
            grad_accum_steps=data.grad_accum_steps,
            crop_scale=data.crop_scale,
            crop_aspect=data.crop_aspect,
            horizontal_flip=data.horizontal_flip,
        )

    @classmethod
    def validation(
        cls, folder: Path, manifest: Manifest, validation: ValidationSection, num_workers: int, ranks: Ranks
    ) -> LoaderPlan:
        return cls(
            folder=folder,
            manifest=manifest,
            split="val",
            is_training=False,
            seed=0,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=num_workers,
            pin_memory=ranks.device.type == "cuda",
            batch_size=validation.batch_size,
            crop_ratio=validation.crop_ratio,
        )


class Loader(ABC):
    """Batches of one split for one rank.

    Raises (on construction):
        ValueError: shards or index are missing or have not the size that the manifest says.
    """

    def __init__(self, plan: LoaderPlan) -> None:
        self.plan = plan
        self.index = load_index(plan.folder, plan.manifest, plan.split)
        self.shards = [plan.folder / shard.name for shard in plan.manifest.splits[plan.split].shards]
        for path, entry in zip(self.shards, plan.manifest.splits[plan.split].shards, strict=True):
            check_size(path, entry)
        self._content = [np.memmap(path, np.uint8, "r") for path in self.shards]
        self._intact = np.zeros(len(self.index), bool)

    @property
    def num_samples(self) -> int:
        """Samples of the split, over all ranks."""
        return len(self.index)

    def epoch(self, epoch: int, start_sample: int = 0, *, resolution: int) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch.

        Args:
            epoch: decides order, crops and flips; without effect on a validation split.
            start_sample: samples of this epoch that all ranks together have consumed; found in O(1).
            resolution: side of the images in pixels.

        Raises:
            RuntimeError: the bytes of a sample are not those that were prepared.
        """
        requests = self._requests(epoch, start_sample, resolution)
        for request, images in zip(requests, self._decode(requests, resolution), strict=True):
            # Bytes are checked after they were decoded, while they are in the page cache, and once a run.
            self._check_bytes(request.sample_ids)
            labels = torch.from_numpy(self.index["label"][request.sample_ids].astype(np.int64))
            yield Batch(images, labels, torch.from_numpy(request.sample_ids))

    def _requests(self, epoch: int, start_sample: int, resolution: int) -> list[Request]:
        plan = self.plan
        if not plan.is_training:
            batches = rank_validation_batches(self.num_samples, plan.batch_size, plan.rank, plan.world_size)
        else:
            batches = rank_micro_batches(
                epoch_order(plan.seed, epoch, self.num_samples),
                start_sample,
                plan.global_batch_size,
                plan.grad_accum_steps,
                plan.rank,
                plan.world_size,
            )
        if not batches:
            return []
        ids = np.concatenate(batches)
        boxes, flips = self._augmentation(epoch, ids)
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        parts = zip(batches, np.split(boxes, ends), np.split(flips, ends), strict=True)
        return [Request(batch, box, flip, resolution) for batch, box, flip in parts]

    def _augmentation(self, epoch: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plan, widths, heights = self.plan, self.index["width"][ids], self.index["height"][ids]
        if not plan.is_training:
            return center_crops(widths, heights, plan.crop_ratio), np.zeros(len(ids), bool)
        boxes = random_resized_crops(
            plan.seed, epoch, ids, widths, heights, plan.crop_scale, plan.crop_aspect
        )
        flips = random_flips(plan.seed, epoch, ids) if plan.horizontal_flip else np.zeros(len(ids), bool)
        return boxes, flips

    def _check_bytes(self, sample_ids: np.ndarray) -> None:
        for sample_id in sample_ids[~self._intact[sample_ids]]:
            if crc32c(self.read_jpeg(sample_id)) != self.index["crc32c"][sample_id]:
                key = load_keys(self.plan.folder, self.plan.manifest, self.plan.split)[sample_id]
                shard = self.shards[self.index["shard"][sample_id]]
                raise RuntimeError(
                    f"sample {sample_id} ({key}) in {shard} is damaged: its bytes are not those that were "
                    "prepared (CRC-32C differs); copy the data set again, or prepare it again"
                )
            self._intact[sample_id] = True

    def read_jpeg(self, sample_id: int) -> bytes:
        """The stored bytes of one sample."""
        row = self.index[sample_id]
        offset = int(row["offset"])
        return self._content[row["shard"]][offset : offset + int(row["length"])].tobytes()

    @abstractmethod
    def _decode(self, requests: list[Request], resolution: int) -> Iterator[torch.Tensor]:
        """Images of each request in order: uint8, shape (n, resolution, resolution, 3)."""

    @abstractmethod
    def close(self) -> None:
        """Free threads, processes and maps; may be called twice."""
