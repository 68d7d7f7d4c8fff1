"""Area interpolation, as OpenCV's INTER_AREA defines it: the one that every loader uses.

Shrinking, a pixel of the result is the mean of the area it covers, fractions of pixels counted as such. If
either side grows, both are interpolated linearly between neighbours, at OpenCV's coordinates. Both are
separable: weights for the rows, others for the columns.

Sums of rows rather than matrix products: MKL, which torch calls for those, may spin for ever in a process
that was forked, as a DataLoader's workers are, from one whose threads had used it.
"""

from __future__ import annotations

import functools

import torch


def resize_area(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize to a square.

    Args:
        pixels: uint8, shape (height, width, 3).
        side: of the result, in pixels.

    Returns:
        uint8, shape (side, side, 3).
    """
    height, width, channels = pixels.shape
    shrinks = height >= side and width >= side
    rows, columns = _taps(height, side, shrinks), _taps(width, side, shrinks)
    # Rows, then columns; turned in between, so that both are sums of whole rows.
    turned = _weighted_sum(pixels.reshape(height, -1).float(), rows)
    turned = turned.reshape(side, width, channels).transpose(0, 1)
    resized = _weighted_sum(turned.reshape(width, -1), columns)
    resized = resized.reshape(side, side, channels).transpose(0, 1)
    return resized.round_().clamp_(0, 255).to(torch.uint8).contiguous()


def _weighted_sum(rows: torch.Tensor, taps: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    total = torch.zeros(len(taps[0][0]), rows.shape[1])
    for positions, weights in taps:
        total.addcmul_(rows[positions], weights)
    return total


@functools.lru_cache(maxsize=1024)
def _taps(size: int, side: int, shrinks: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`_weights` without zeros: the n-th pixel of each result, shape (side,), and its weight, (side, 1)."""
    weights = _weights(size, side, shrinks)
    first = (weights != 0).int().argmax(1)
    num_taps = int((weights != 0).sum(1).max())
    taps = []
    for tap in range(num_taps):
        positions = (first + tap).clamp(max=size - 1)
        weight = torch.where(first + tap < size, weights[torch.arange(side), positions], 0)
        taps.append((positions, weight[:, None]))
    return taps


def _weights(size: int, side: int, shrinks: bool) -> torch.Tensor:
    """Weights of `size` pixels in each of `side` results: float32, shape (side, size), rows sum to 1."""
    scale = size / side
    place = torch.arange(side, dtype=torch.float64)
    if shrinks:
        begin, end = place * scale, (place + 1) * scale
        pixel = torch.arange(size, dtype=torch.float64)
        covered = torch.minimum(end[:, None], pixel + 1) - torch.maximum(begin[:, None], pixel)
        return (covered.clamp(min=0) / scale).float()
    inverse = side / size  # OpenCV's way to compute it decides where `place * scale` is a whole number
    first = (place * (1 / inverse)).floor()
    fraction = (place + 1) - (first + 1) * inverse
    fraction = torch.where(fraction <= 0, 0, fraction - fraction.floor())
    weights = torch.zeros(side, size, dtype=torch.float64)
    positions = torch.arange(side)
    weights[positions, first.long().clamp(max=size - 1)] += 1 - fraction
    weights[positions, (first.long() + 1).clamp(max=size - 1)] += fraction
    return weights.float()
