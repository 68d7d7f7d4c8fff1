"""Corruptions that change pixels where they are: noise, light and colour, blocks.

Each takes an image, float32 (side, side, 3) in [0, 1], its parameters (of ImageNet-C) and a generator, and
returns an image of the same shape, not yet clipped.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]


def gaussian_noise(image: Pixels, rng: Generator, deviation: float) -> Pixels:
    return image + deviation * rng.standard_normal(image.shape, dtype=np.float32)


def shot_noise(image: Pixels, rng: Generator, photons: float) -> Pixels:
    """Counts of photons, `photons` of them in a white pixel."""
    return (rng.poisson(image * photons) / photons).astype(np.float32)


def impulse_noise(image: Pixels, rng: Generator, share: float) -> Pixels:
    """Salt and pepper, half each, in `share` of the values."""
    draws = rng.random(image.shape, dtype=np.float32)
    return np.where(draws < share, (draws < share / 2).astype(np.float32), image)


def contrast(image: Pixels, _rng: Generator, factor: float) -> Pixels:
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * np.float32(factor) + means


def brightness(image: Pixels, _rng: Generator, added: float) -> Pixels:
    """Raise the V of HSV; hue and saturation stay, which scales the three channels alike."""
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + np.float32(added), 1)
    return np.where(value > 0, image * (raised / np.maximum(value, 1e-6)), raised)


def saturate(image: Pixels, _rng: Generator, factor: float, added: float) -> Pixels:
    """Change the S of HSV. Grey stays grey: it has no hue to strengthen (ImageNet-C turns it red)."""
    value = image.max(axis=2, keepdims=True)
    distance = value - image
    saturation = distance.max(axis=2, keepdims=True) / np.maximum(value, 1e-6)
    wanted = np.clip(saturation * np.float32(factor) + np.float32(added), 0, 1)
    return np.where(saturation > 0, value - distance * (wanted / np.maximum(saturation, 1e-6)), image)


def pixelate(image: Pixels, _rng: Generator, factor: float) -> Pixels:
    """`factor` as many pixels a side."""
    side = image.shape[0]
    small = max(1, int(side * factor))
    picture = Image.fromarray(to_bytes(image)).resize((small, small), Image.Resampling.BOX)
    return to_floats(np.asarray(picture.resize((side, side), Image.Resampling.BOX)))


def jpeg(image: Pixels, _rng: Generator, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(buffer, "JPEG", quality=quality)
    return to_floats(np.asarray(Image.open(buffer, formats=["JPEG"])))


def to_bytes(image: Pixels) -> NDArray[np.uint8]:
    """Clipped and rounded to uint8."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_floats(image: NDArray[np.uint8]) -> Pixels:
    """uint8 → float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)
