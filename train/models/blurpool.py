"""BlurPool: a low-pass filter before every strided convolution (Zhang, 2019: "Making convolutional networks
shift-invariant again"), in the form of FFCV's ImageNet script.

The filter is the binomial [1, 2, 1] × [1, 2, 1] / 16 on each channel, with stride 1 and zeros around the
image. It comes before the convolution, which keeps its stride, weights and keys: pretrained weights fit. The
stem, which sees three channels, stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.specialize import specialize

MIN_CHANNELS = 16


def insert_blurpool(model: nn.Module) -> int:
    """Blur what strided convolutions with 16 input channels or more see; how many there are.

    Raises:
        ValueError: the model has none.
    """
    strided = [module for module in model.modules() if _wants_blur(module)]
    if not strided:
        raise ValueError(
            f"model.blurpool: the model has no strided convolution with {MIN_CHANNELS} input channels or "
            "more; set it to false"
        )
    for module in strided:
        # Not in the state dict; 9 numbers a layer, so that no step copies them to the device.
        kernel = binomial_kernel().to(module.get_parameter("weight"))
        module.register_buffer("blur_kernel", kernel, persistent=False)
        specialize(module, BlurBefore)
    return len(strided)


def _wants_blur(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and not isinstance(module, BlurBefore)
        and max(module.stride) > 1
        and module.in_channels >= MIN_CHANNELS
    )


class BlurBefore(nn.Module):
    """A convolution of what `blur` leaves of its input."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(blur(images, self.blur_kernel))  # type: ignore[arg-type]


def binomial_kernel() -> Tensor:
    """The filter, (1, 1, 3, 3)."""
    row = torch.tensor([0.25, 0.5, 0.25])
    return (row[:, None] * row[None, :])[None, None]


def blur(images: Tensor, kernel: Tensor) -> Tensor:
    """One 3×3 filter on every channel; zeros are taken to stand around the image.

    Args:
        images: (N, C, H, W).
        kernel: (1, 1, 3, 3), on the same device.

    Returns:
        The same shape as `images`.
    """
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
