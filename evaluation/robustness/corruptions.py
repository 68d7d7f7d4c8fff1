"""ImageNet-C-style corruptions of images, computed on the fly.

D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. Kinds, groups and parameters of the severities 1 to 5 are theirs, without frost,
which needs photographs. They are meant for crops of 224 pixels. Here lengths in pixels (blurs, warps, flakes)
are scaled to the side of the images; what belongs to the pixel grid (noise, pixelate, JPEG) is not. Small
differences of the drawing are named where they are. So figures are not comparable with published mCE.

    corrupted = corrupt(images, "fog", severity=3, seed=0, sample_ids=ids)
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.robustness import neighbour_changes, pixel_changes
from evaluation.robustness.pixel_changes import to_bytes, to_floats

SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 8


@dataclass(frozen=True)
class Corruption:
    """One kind. `name` is for people; parameters holds a tuple a severity, as `change` takes them."""

    name: str
    group: str
    change: Callable[..., NDArray[np.float32]]
    parameters: tuple[tuple[Any, ...], ...]


# The deviation is of pixels in [0, 1]; the other units are in the docstrings of the functions.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "Gaussian noise", "noise", pixel_changes.gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))
    ),
    "shot_noise": Corruption(
        "Shot noise", "noise", pixel_changes.shot_noise, ((60,), (25,), (12,), (5,), (3,))
    ),
    "impulse_noise": Corruption(
        "Impulse noise", "noise", pixel_changes.impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))
    ),
    "defocus_blur": Corruption(
        "Defocus", "blur", neighbour_changes.defocus_blur, ((3,), (4,), (6,), (8,), (10,))
    ),
    "glass_blur": Corruption(
        "Frosted glass",
        "blur",
        neighbour_changes.glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        "Motion", "blur", neighbour_changes.motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
    ),
    "zoom_blur": Corruption(
        "Zoom",
        "blur",
        neighbour_changes.zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        "Snow",
        "weather",
        neighbour_changes.snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": Corruption(
        "Fog", "weather", neighbour_changes.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    ),
    "brightness": Corruption(
        "Brightness", "weather", pixel_changes.brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))
    ),
    "contrast": Corruption(
        "Low contrast", "digital", pixel_changes.contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))
    ),
    "elastic": Corruption(
        "Elastic warp",
        "digital",
        neighbour_changes.elastic,
        (
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
    ),
    "pixelate": Corruption(
        "Pixelate", "digital", pixel_changes.pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))
    ),
    "jpeg": Corruption("JPEG", "digital", pixel_changes.jpeg, ((25,), (18,), (15,), (10,), (7,))),
    "saturate": Corruption(
        "Saturation", "digital", pixel_changes.saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
    ),
}
GROUPS = tuple(dict.fromkeys(corruption.group for corruption in CORRUPTIONS.values()))


def kinds_of(group: str) -> tuple[str, ...]:
    """The kinds of a group, or with "all" of every group.

    Raises ValueError for another name.
    """
    if group != "all" and group not in GROUPS:
        raise ValueError(f"There is no group of corruptions {group!r}: choose all, {', '.join(GROUPS)}.")
    return tuple(kind for kind, entry in CORRUPTIONS.items() if group in ("all", entry.group))


def corrupt(
    images: NDArray[np.uint8], kind: str, severity: int, seed: int, sample_ids: Sequence[int]
) -> NDArray[np.uint8]:
    """Images under one kind of corruption.

    Args:
        images: uint8 (n, side, side, 3), a validation crop each; not changed.
        kind: a key of CORRUPTIONS. severity: 1 to 5.
        sample_ids: n of them, from 0 to 2³² - 1. What an image becomes depends on its pixels, its sample id
            and (seed, kind, severity) alone, not on the batch it comes in.

    Returns:
        uint8 (n, side, side, 3).

    Raises:
        ValueError: images of another shape or type, no such kind or severity, a negative seed.
    """
    _check(images, kind, severity, seed, sample_ids)
    entry = CORRUPTIONS[kind]
    parameters = entry.parameters[severity - 1]
    corrupted = np.empty_like(images)
    # One image after the other: each has a generator of its own, most time goes into filters that gain
    # nothing from a batch, and sums could come out otherwise for another size of the batch.
    for position, sample_id in enumerate(sample_ids):
        rng = _generator(seed, kind, severity, int(sample_id))
        corrupted[position] = to_bytes(entry.change(to_floats(images[position]), rng, *parameters))
    return corrupted


def _generator(seed: int, kind: str, severity: int, sample_id: int) -> np.random.Generator:
    # By the name, not by its place in the table, which another kind may change.
    key = np.array([seed, zlib.crc32(kind.encode()) << 32 | sample_id], dtype=np.uint64)
    # A stream counts upwards in the lowest of the four words.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, severity]))


def _check(images: NDArray[np.uint8], kind: str, severity: int, seed: int, sample_ids: Sequence[int]) -> None:
    if kind not in CORRUPTIONS:
        near = difflib.get_close_matches(str(kind), CORRUPTIONS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(CORRUPTIONS)}."
        raise ValueError(f"There is no corruption {kind!r}: {hint}")
    if severity not in SEVERITIES:
        raise ValueError(f"A severity is 1, 2, 3, 4 or 5, not {severity}.")
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise ValueError(f"Images to corrupt must be uint8 (n, side, side, 3), not {images.dtype} {shape}.")
    if shape[1] < MIN_SIDE:
        raise ValueError(f"Images to corrupt need a side of {MIN_SIDE} pixels, not {shape[1]}.")
    if len(sample_ids) != len(images):
        raise ValueError(f"There are {len(sample_ids)} sample ids for {len(images)} images to corrupt.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"A seed must be from 0 to 2⁶³ - 1, not {seed}.")
    if len(sample_ids) and not (min(sample_ids) >= 0 and max(sample_ids) < 2**32):
        raise ValueError("A sample id must be from 0 to 2³² - 1.")
