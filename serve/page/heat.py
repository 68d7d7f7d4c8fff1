"""The picture that shows what a model looked at: heat on the square it sees, the rest of the image dimmed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHOWN_SIDE = 720  # of the longer side, pixels: small images are enlarged for the eye
OPACITY = 0.5
DIMMED = 0.35
# Matplotlib's "inferno" at equal distances: its lightness alone tells low from high.
INFERNO = np.array(
    [
        (0, 0, 4),
        (22, 11, 57),
        (66, 10, 104),
        (106, 23, 110),
        (147, 38, 103),
        (188, 55, 84),
        (221, 81, 58),
        (243, 120, 25),
        (252, 165, 10),
        (246, 215, 70),
        (252, 255, 164),
    ],
    np.float32,
)


def coloured(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (height, width) in [0, 1] → colours, float32 (height, width, 3) in [0, 255]."""
    places = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(heat, places, INFERNO[:, channel]) for channel in range(3)], -1).astype(
        np.float32
    )


def picture(
    pixels: NDArray[np.uint8], crop_ratio: float, heat: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """The image, uint8 (height, width, 3), as people are shown it: at most 720 pixels wide and high.

    Args:
        crop_ratio: of the preprocessing: the model sees a centred square of this share of the shorter side.
        heat: of that square, in [0, 1], of any resolution.
    """
    height, width = pixels.shape[:2]
    scale = SHOWN_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    # The same square as in `Preprocessing.crop`, in pixels of the larger picture.
    side = max(1, int(crop_ratio * min(width, height)))
    top, left = (height - side) // 2 * scale, (width - side) // 2 * scale
    rows = slice(round(top), max(round(top) + 1, round(top + side * scale)))
    columns = slice(round(left), max(round(left) + 1, round(left + side * scale)))
    square = shown[rows, columns].copy()
    shown *= DIMMED
    if heat is not None:
        enlarged = Image.fromarray(heat).resize(square.shape[1::-1], Image.Resampling.BICUBIC)
        colours = coloured(np.asarray(enlarged).clip(0, 1))
        square = (1 - OPACITY) * square + OPACITY * colours
    shown[rows, columns] = square
    return np.rint(shown).clip(0, 255).astype(np.uint8)
