"""The validation preprocessing of a training: a centred square, resized by area; models normalise.

image file → RGB, capped as the training data → centred square of `crop_ratio` × the shorter side
           → area interpolation to resolution × resolution → uint8, NHWC
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .decoding import decode
from .limits import Limits
from .resize import resize_area


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    Attributes:
        resolution: side of the input, pixels.
        crop_ratio: side of the centred square, as a fraction of the image's shorter side.
        mean, std: of pixels in [0, 1], a channel each.
        resolution_cap, cap_side: what the training images were shrunk to, pixels; None: not at all.
        apply_exif: whether images are turned as their EXIF orientation says.
    """

    resolution: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resolution_cap: int | None = 500
    cap_side: str = "longest"
    apply_exif: bool = False

    def __call__(self, content: bytes, limits: Limits | None = None) -> NDArray[np.uint8]:
        """Bytes of an image file → uint8 (resolution, resolution, 3).

        Raises:
            BadImage: they cannot be used; one sentence.
        """
        return self.crop(
            decode(
                content,
                limits or Limits(),
                apply_exif=self.apply_exif,
                cap=self.resolution_cap,
                cap_side=self.cap_side,
            )
        )

    def crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """RGB pixels (height, width, 3) → uint8 (resolution, resolution, 3)."""
        height, width = pixels.shape[:2]
        side = max(1, int(self.crop_ratio * min(width, height)))
        top, left = (height - side) // 2, (width - side) // 2
        return resize_area(pixels[top : top + side, left : left + side], self.resolution)

    def normalized(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 NHWC → float32 NCHW of zero mean and unit deviation, for those who want it so (timm)."""
        mean = 255 * np.asarray(self.mean, np.float32)
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        return np.ascontiguousarray(((images.astype(np.float32) - mean) * scale).transpose(0, 3, 1, 2))
