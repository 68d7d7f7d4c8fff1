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


@dataclass(frozen=True)
class Targets:
    """What the images of a batch show, on the device.

    Attributes:
        labels: int64, shape (n,).
        other_labels: of the images that were mixed in, int64, shape (n,); None where nothing was.
        share: of `labels` in each image, float32, shape (n,), from 0 to 1; the other label has the rest.
    """

    labels: torch.Tensor
    other_labels: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def dense(self, num_classes: int) -> torch.Tensor:
        """Shares of all classes: float32, shape (n, num_classes), each row with sum 1."""
        rows = nn.functional.one_hot(self.labels, num_classes).float()
        if self.other_labels is None or self.share is None:
            return rows
        others = nn.functional.one_hot(self.other_labels, num_classes).float()
        return torch.lerp(others, rows, self.share[:, None])


class Normalize(nn.Module):
    """uint8 (or float, 0–255) NHWC → float32 NCHW with zero mean and unit deviation a channel, on the device.

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
