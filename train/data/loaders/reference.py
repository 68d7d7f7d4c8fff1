"""The judge among the loaders: torch DataLoader, torchvision decoder, area interpolation, nothing clever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from train.data.loaders.base import Loader, LoaderPlan, Request
from train.data.resize import resize_area


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
        batches = iter(self._loader)
        for request in requests:
            try:
                images = next(batches)
            except RuntimeError:
                # Most likely damaged bytes: say which sample, rather than what the decoder made of it.
                self._intact[request.sample_ids] = False
                self._check_bytes(request.sample_ids)
                raise
            yield images

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
            crop = functional.crop(pixels, top, left, height, width)
            resized = resize_area(crop.permute(1, 2, 0), side)
            image.copy_(
                functional.horizontal_flip(resized.permute(2, 0, 1)).permute(1, 2, 0) if flip else resized
            )
        return images
