"""Accuracy against what an image is like: its size, shape, brightness, contrast and detail.

    properties = measure_properties(stored, predictions.sample_ids)
    groups = accuracy_by_group(properties.values["brightness"], is_right, expected)
    groups[0].top1, groups[0].interval                     # of the darkest fifth

Brightness and contrast are the mean and the standard deviation of the luma (0 … 1) of the image at 64 × 64
pixels, so that large and small ones compare; the standard deviation is RMS contrast (Peli, JOSA A 7, 1990).
Bytes of JPEG a pixel stand in for detail: texture and noise cost bytes, sky does not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chi2_contingency

from data_prep.progress import progress_bar
from evaluation.metrics import wilson_interval
from evaluation.stored_images import StoredImages

MAX_IMAGES = 20_000
LUMA_PIXELS = 64
NUM_GROUPS = 5
MIN_GROUP_IMAGES = 30


@dataclass(frozen=True, eq=False)
class ImageProperties:
    """sample_ids int64 (n,); values: name → float64 (n,). num_in_split images were there to draw from."""

    sample_ids: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]
    num_in_split: int


@dataclass(frozen=True)
class PropertyGroup:
    """Images whose property lies in [low, high] (both occur).

    expected_top1 is the mean top-1 of their classes: what the group would have if only its classes mattered.
    """

    low: float
    high: float
    count: int
    top1: float
    interval: tuple[float, float]
    expected_top1: float


def measure_properties(
    stored: StoredImages,
    sample_ids: NDArray[np.int64],
    *,
    max_images: int = MAX_IMAGES,
    seed: int = 0,
    progress: bool = True,
) -> ImageProperties:
    """Properties of these samples, or of max_images of them drawn by seed.

    Every image is decoded once, at an eighth to all of its size, whichever is enough for 64 pixels.
    """
    chosen = np.sort(sample_ids)
    if len(chosen) > max_images:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, max_images, replace=False))
    rows = stored.index[chosen]
    width, height = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    luma = np.empty((len(chosen), 2))
    with progress_bar(len(chosen), "image properties", progress) as bar:
        for place, sample_id in enumerate(chosen.tolist()):
            luma[place] = mean_and_std_of_luma(stored.jpeg(sample_id))
            bar.update()
    values = {
        "size": np.sqrt(width * height),
        "aspect_ratio": width / height,
        "brightness": luma[:, 0],
        "contrast": luma[:, 1],
        "bytes_per_pixel": rows["length"] / (width * height),
    }
    return ImageProperties(chosen, values, num_in_split=len(sample_ids))


def mean_and_std_of_luma(jpeg: bytes) -> tuple[float, float]:
    """Brightness and contrast of an image, each 0 … 1, at 64 × 64 pixels."""
    picture = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
    picture.draft("L", (LUMA_PIXELS, LUMA_PIXELS))  # the decoder's own reduction: less than a millisecond
    small = picture.convert("L").resize((LUMA_PIXELS, LUMA_PIXELS), Image.Resampling.BOX)
    luma = np.asarray(small, dtype=np.float64) / 255
    return float(luma.mean()), float(luma.std())


def accuracy_by_group(
    values: NDArray[np.float64],
    is_right: NDArray[np.bool_],
    expected: NDArray[np.float64],
    *,
    num_groups: int = NUM_GROUPS,
    min_images: int = MIN_GROUP_IMAGES,
) -> list[PropertyGroup]:
    """Top-1 in groups of about equally many images, lowest values first; all arrays (n,).

    Equal values stay together and a group has at least min_images, so there may be fewer groups: one where
    all images are alike. expected: the top-1 of each image's class.
    """
    order = np.argsort(values, kind="stable")
    target = max(min_images, -(-len(values) // num_groups))
    ends = []
    start = 0
    while start < len(order):
        end = min(start + target, len(order))
        while end < len(order) and values[order[end]] == values[order[end - 1]]:
            end += 1
        # A rest too small for a group of its own goes to the last one.
        if len(order) - end < max(min_images, target // 2):
            end = len(order)
        ends.append((start, end))
        start = end
    groups = []
    for start, end in ends:
        rows = order[start:end]
        num_right = int(is_right[rows].sum())
        groups.append(
            PropertyGroup(
                low=float(values[rows[0]]),
                high=float(values[rows[-1]]),
                count=len(rows),
                top1=num_right / len(rows),
                interval=wilson_interval(num_right, len(rows)),
                expected_top1=float(expected[rows].mean()),
            )
        )
    return groups


def difference_p_value(groups: list[PropertyGroup]) -> float:
    """How often chance alone would part the groups' top-1 as much: the χ² test of independence; 1 for one."""
    right = np.array([round(group.top1 * group.count) for group in groups])
    wrong = np.array([group.count for group in groups]) - right
    if len(groups) < 2 or not right.sum() or not wrong.sum():
        return 1.0
    return float(chi2_contingency(np.stack([right, wrong])).pvalue)
