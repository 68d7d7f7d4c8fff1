"""Crops and flips as pure functions of (seed, epoch, sample id).

The numbers come from a counter-based generator (Philox4x32-10; Salmon et al., 2011): the draw for a sample
depends on nothing but its id, so any rank, worker or resumed run makes the same one, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

CROP_STREAM = 2  # attempts count upwards from here; below are flip and the shuffle of order.py
FLIP_STREAM = 0
CROP_ATTEMPTS = 10
REPLACEMENT_STREAM = 64  # attempts count upwards
REPLACEMENT_ATTEMPTS = 32


@dataclass(frozen=True)
class Augmentation:
    """The rule by which a sample is cropped and mirrored.

    Attributes:
        is_random: crops and flips at random; else the centre crop of `crop_ratio`, never mirrored.
        crop_scale: share of the area, low and high.
        crop_aspect: width : height, low and high.
    """

    is_random: bool
    seed: int = 0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_aspect: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: bool = False
    crop_ratio: float = 1.0

    def boxes_and_flips(
        self, epoch: int, sample_ids: np.ndarray, widths: np.ndarray, heights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crops and flips of samples of these sizes in pixels.

        Returns:
            int32, shape (n, 4): top, left, height, width; and bool, shape (n,).
        """
        still = np.zeros(len(sample_ids), bool)
        if not self.is_random:
            return center_crops(widths, heights, self.crop_ratio), still
        boxes = random_resized_crops(
            self.seed, epoch, sample_ids, widths, heights, self.crop_scale, self.crop_aspect
        )
        return boxes, random_flips(self.seed, epoch, sample_ids) if self.horizontal_flip else still

    def replacements(self, epoch: int, sample_id: int, num_samples: int) -> np.ndarray:
        """Samples to try, one after another, in place of a damaged one: int64, REPLACEMENT_ATTEMPTS of them.

        They are ordinals among the `num_samples` that may take its place: ids, where all may.

        Drawn at random rather than taken from beside it: damage comes in stretches.
        """
        streams = range(REPLACEMENT_STREAM, REPLACEMENT_STREAM + REPLACEMENT_ATTEMPTS)
        draws = [uniforms(self.seed, epoch, np.array([sample_id]), stream)[0, 0] for stream in streams]
        return (np.array(draws) * num_samples).astype(np.int64)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10.

    Args:
        counter: uint32, shape (n, 4).
        key: two 32-bit words.

    Returns:
        uint32, shape (n, 4): four random words a counter.
    """
    c0, c1, c2, c3 = (counter[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    shift, mask = np.uint64(32), np.uint64(_MASK)
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & mask,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, epoch: int, sample_ids: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1): float64, shape (n, 4), four for each sample id."""
    ids = sample_ids.astype(np.uint64)
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0] = (ids & np.uint64(_MASK)).astype(np.uint32)
    counter[:, 1] = (ids >> np.uint64(32)).astype(np.uint32)
    counter[:, 2] = stream
    return philox4x32(counter, (seed & _MASK, epoch & _MASK)) / 2.0**32


def random_resized_crops(
    seed: int,
    epoch: int,
    sample_ids: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """Boxes of RandomResizedCrop (Szegedy et al., 2015; rules as in torchvision).

    Ten attempts at a random area and aspect ratio; where none fits, the largest centre crop within the
    aspect limits.

    Returns:
        int32, shape (n, 4): top, left, height, width in pixels of the stored image.
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    boxes = _fallback_crops(widths, heights, aspect)
    log_aspect = np.log(aspect)
    todo = np.arange(len(sample_ids))
    for attempt in range(CROP_ATTEMPTS):
        draw = uniforms(seed, epoch, sample_ids[todo], CROP_STREAM + attempt)
        width, height = widths[todo], heights[todo]
        area = width * height * (scale[0] + draw[:, 0] * (scale[1] - scale[0]))
        ratio = np.exp(log_aspect[0] + draw[:, 1] * (log_aspect[1] - log_aspect[0]))
        crop_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        crop_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
        top = (draw[:, 2] * (height - crop_height + 1)).astype(np.int64)
        left = (draw[:, 3] * (width - crop_width + 1)).astype(np.int64)
        candidate = np.stack([top, left, crop_height, crop_width], axis=1)
        boxes[todo[fits]] = candidate[fits]
        todo = todo[~fits]
        if not len(todo):
            break
    return boxes


def _fallback_crops(widths: np.ndarray, heights: np.ndarray, aspect: tuple[float, float]) -> np.ndarray:
    crop_width = np.minimum(widths, np.rint(heights * aspect[1]).astype(np.int64))
    crop_height = np.minimum(heights, np.rint(widths / aspect[0]).astype(np.int64))
    crop_width, crop_height = np.maximum(crop_width, 1), np.maximum(crop_height, 1)
    return _centred(widths, heights, crop_width, crop_height)


def center_crops(widths: np.ndarray, heights: np.ndarray, ratio: float) -> np.ndarray:
    """Centred squares of `ratio` times the shorter side: int32, shape (n, 4): top, left, height, width."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    side = np.maximum((ratio * np.minimum(widths, heights)).astype(np.int64), 1)
    return _centred(widths, heights, side, side)


def _centred(
    widths: np.ndarray, heights: np.ndarray, crop_width: np.ndarray, crop_height: np.ndarray
) -> np.ndarray:
    top, left = (heights - crop_height) // 2, (widths - crop_width) // 2
    return np.stack([top, left, crop_height, crop_width], axis=1).astype(np.int32)


def random_flips(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Which samples are mirrored: bool, shape (n,), each with probability one half."""
    return uniforms(seed, epoch, sample_ids, FLIP_STREAM)[:, 0] < 0.5
