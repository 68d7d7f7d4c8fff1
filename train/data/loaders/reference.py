"""The judge among the loaders: torch's DataLoader, torchvision's decoder and resize, nothing clever.

Interpolation: bilinear with antialiasing (a triangle filter as wide as the reduction).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from train.data.loaders.base import Loader, LoaderPlan, Request


class ReferenceLoader(Loader):
    """Decode in worker processes (or in this one, with `num_workers` 0)."""

    def __init__(self, plan: LoaderPlan) -> None:
        super().__init__(plan)
        self._sampler = _RequestSampler()
        paths = [str(path) for path in self.shards]
        self._loader: DataLoader | None = DataLoader(
            _JpegDataset(paths, self.index),
            batch_size=None,  # a request is a whole batch
            sampler=self._sampler,
            num_workers=plan.num_workers,
            persistent_workers=plan.num_workers > 0,
            prefetch_factor=2 if plan.num_workers else None,
            pin_memory=plan.pin_memory,
        )

    def _decode(self, requests: list[Request], resolution: int) -> Iterator[torch.Tensor]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        self._sampler.requests = requests
        yield from self._loader

    def close(self) -> None:
        self._loader = None  # its workers end with it


class _RequestSampler(Sampler[Request]):
    """Hands the current epoch's requests to the workers, which keep no state of their own."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _JpegDataset(Dataset):
    def __init__(self, paths: list[str], index: np.ndarray) -> None:
        self._paths = paths
        self._index = index
        self._content: list[np.memmap] | None = None

    def __getitem__(self, request: Request) -> torch.Tensor:
        if self._content is None:
            # Mapped in the worker itself; all ranks and workers share the page cache.
            self._content = [np.memmap(path, np.uint8, "r") for path in self._paths]
        side = request.resolution
        images = torch.empty((len(request.sample_ids), side, side, 3), dtype=torch.uint8)
        for image, sample_id, box, flip in zip(
            images, request.sample_ids, request.boxes, request.flips, strict=True
        ):
            row = self._index[sample_id]
            offset = int(row["offset"])
            stored = self._content[row["shard"]][offset : offset + int(row["length"])]
            pixels = decode_jpeg(torch.from_numpy(np.array(stored)), ImageReadMode.RGB)
            top, left, height, width = box.tolist()
            pixels = functional.resized_crop(
                pixels, top, left, height, width, [side, side], InterpolationMode.BILINEAR, antialias=True
            )
            image.copy_((pixels.flip(-1) if flip else pixels).permute(1, 2, 0))
        return images
