"""The batch that every loader yields, and its way to the model's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """Some samples of this rank.

    Attributes:
        images: uint8, shape (n, resolution, resolution, 3); in pinned memory where CUDA is present.
        labels: int64, shape (n,).
        sample_ids: int64, shape (n,).
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Normalize(nn.Module):
    """uint8 NHWC → float32 NCHW with zero mean and unit deviation a channel, on the device.

    Args:
        mean, std: of pixels in [0, 1], three values each.
        channels_last: keep NHWC memory order (no copy); else make it contiguous NCHW.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std, dtype=torch.float32)), persistent=False)
        self.channels_last = channels_last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        normalized = ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        return normalized if self.channels_last else normalized.contiguous()


def normalization_statistics(
    kind: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of `data.normalization`: the data set's own, ImageNet's, or none (pixels in [0, 1])."""
    if kind == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    if kind == "unit":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return mean, std
