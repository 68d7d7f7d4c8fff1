"""Area interpolation in NumPy: pixel for pixel the training's reference loader (`train/data/resize.py`).

Shrinking, a pixel of the result is the mean of the area it covers; if either side grows, both are
interpolated linearly between neighbours, at OpenCV's coordinates. Each product is added with one rounding, as
processors with FMA do it: in float64, where a product of two float32 is exact, and back.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Tap = tuple[NDArray[np.int64], NDArray[np.float64]]


def resize_area(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize to a square: uint8 (height, width, 3) → (side, side, 3)."""
    height, width, channels = pixels.shape
    shrinks = height >= side and width >= side
    rows, columns = _taps(height, side, shrinks), _taps(width, side, shrinks)
    # Rows, then columns; turned in between, so that both are sums of whole rows.
    turned = _weighted_sum(pixels.reshape(height, -1), rows)
    turned = turned.reshape(side, width, channels).swapaxes(0, 1)
    resized = _weighted_sum(turned.reshape(width, -1), columns)
    resized = resized.reshape(side, side, channels).swapaxes(0, 1)
    return np.ascontiguousarray(np.rint(resized).clip(0, 255).astype(np.uint8))


def _weighted_sum(rows: NDArray[np.generic], taps: tuple[Tap, ...]) -> NDArray[np.float32]:
    total = np.zeros((len(taps[0][0]), rows.shape[1]), np.float32)
    for positions, weights in taps:
        product = rows[positions].astype(np.float64)
        product *= weights
        product += total
        total = product.astype(np.float32)
    return total


@functools.lru_cache(maxsize=1024)
def _taps(size: int, side: int, shrinks: bool) -> tuple[Tap, ...]:
    """The n-th pixel of each result, shape (side,), and its weight, (side, 1)."""
    weights = _weights(size, side, shrinks)
    first = (weights != 0).argmax(1)
    num_taps = int((weights != 0).sum(1).max())
    taps = []
    for tap in range(num_taps):
        positions = np.minimum(first + tap, size - 1)
        weight = np.where(first + tap < size, weights[np.arange(side), positions], np.float32(0))
        taps.append((positions, weight[:, None].astype(np.float64)))
    return tuple(taps)


def _weights(size: int, side: int, shrinks: bool) -> NDArray[np.float32]:
    """Weights of `size` pixels in each of `side` results: shape (side, size), rows sum to 1."""
    scale = size / side
    place = np.arange(side, dtype=np.float64)
    if shrinks:
        begin, end = place * scale, (place + 1) * scale
        pixel = np.arange(size, dtype=np.float64)
        covered = np.minimum(end[:, None], pixel + 1) - np.maximum(begin[:, None], pixel)
        return (covered.clip(min=0) / scale).astype(np.float32)
    inverse = side / size  # OpenCV's way to compute it decides where `place * scale` is a whole number
    first = np.floor(place * (1 / inverse))
    fraction = (place + 1) - (first + 1) * inverse
    fraction = np.where(fraction <= 0, 0, fraction - np.floor(fraction))
    weights = np.zeros((side, size))
    positions = np.arange(side)
    weights[positions, first.astype(np.int64).clip(max=size - 1)] += 1 - fraction
    weights[positions, (first.astype(np.int64) + 1).clip(max=size - 1)] += fraction
    return weights.astype(np.float32)
