"""The project's own small network: a stem and four residual blocks, for small images and quick experiments.

Every block halves the side. The identity path goes along: `projection` is a strided 1×1 convolution with
BatchNorm; `pool` has no weights, averages 2×2 pixels and fills new channels with zeros (option A of He et
al., 2016, with pooling in place of subsampling).

Example:
    >>> model = ResidualCnn(num_classes=40, widths=[32, 64, 128, 256], shortcut="pool")
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 40])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

NUM_BLOCKS = 4


class ResidualCnn(nn.Module):
    """Stem, four residual blocks, mean over pixels, dropout, linear layer.

    Input (N, 3, H, W) float of any side, output (N, num_classes).

    Args:
        widths: channels of the four blocks.
        stem_stride: 2 halves the image before the first block; 1 keeps it, for images of 32 pixels.
        shortcut: how the identity path gets to the block's shape.
        dropout: before the linear layer.
        stochastic_depth: of the last block, rising to it linearly from 0 (Huang et al., 2016).

    Raises:
        ValueError: an argument that makes no network.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_stride: int = 2,
        shortcut: Literal["projection", "pool"] = "projection",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        _check(widths, stem_stride, shortcut)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        inputs = [widths[0], *widths[:-1]]
        rates = [stochastic_depth * index / (NUM_BLOCKS - 1) for index in range(NUM_BLOCKS)]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(*shape, shortcut=shortcut, stochastic_depth=rate)
                for *shape, rate in zip(inputs, widths, rates, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Module = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.stem(images))
        return self.head(self.dropout(self.pool(features).flatten(1)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the first with stride 2, around an identity path of the same shape."""

    def __init__(self, inputs: int, outputs: int, *, shortcut: str, stochastic_depth: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stochastic_depth = StochasticDepth(stochastic_depth, "row")
        self.shortcut = Projection(inputs, outputs) if shortcut == "projection" else PooledIdentity(outputs)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(features)))))
        return self.act2(self.shortcut(features) + self.stochastic_depth(residual))


class Projection(nn.Sequential):
    """A strided 1×1 convolution with BatchNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))


class PooledIdentity(nn.Module):
    """The input itself: 2×2 pixels averaged, missing channels filled with zeros."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, features: Tensor) -> Tensor:
        # An odd side is rounded up, as by the strided convolution beside it.
        pooled = F.avg_pool2d(features, 2, ceil_mode=True)
        return F.pad(pooled, (0, 0, 0, 0, 0, self.outputs - pooled.shape[1]))


def _check(widths: Sequence[int], stem_stride: int, shortcut: str) -> None:
    numbers = isinstance(widths, Sequence) and not isinstance(widths, str)
    if not numbers or len(widths) != NUM_BLOCKS or not all(type(w) is int and w > 0 for w in widths):
        raise ValueError(
            f"model.options: widths must be {NUM_BLOCKS} channel counts, e.g. [64, 128, 256, 512]"
        )
    if type(stem_stride) is not int or stem_stride not in (1, 2):
        raise ValueError("model.options: stem_stride must be 1 or 2")
    if shortcut not in ("projection", "pool"):
        raise ValueError("model.options: shortcut must be projection or pool")
    if shortcut == "pool" and list(widths) != sorted(widths):
        raise ValueError("model.options: with shortcut pool, widths must not fall: it can add channels only")
