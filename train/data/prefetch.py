"""Batches on their way to the device: on a GPU the next one is copied while the step computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from train.data.batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with images and labels on `device`; on CUDA one copy ahead, in a stream of its own."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = replace(
                batch,
                images=batch.images.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
            )
        if ahead is not None:
            yield _ready(ahead, stream, device)
        ahead = copied
    if ahead is not None:
        yield _ready(ahead, stream, device)


def _ready(batch: Batch, stream: torch.cuda.Stream, device: torch.device) -> Batch:
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(stream)
    for tensor in (batch.images, batch.labels):
        tensor.record_stream(computing)  # else its memory could be given to the next copy too early
    return batch
