"""A seeded choice of images by class, for people to look at.

Up to 10 classes with 6 images each; of data sets with hardly any images a class, 30 classes with one each.
The choice depends on the data set and the seed alone.

Example:
    >>> rows, faults = choose_rows(data_set, seed=0)
    >>> rows[0].title, [picture.size for picture in rows[0].pictures]
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.stats.samples import DamagedSample, DataSet, Split

MAX_CLASSES = 10
IMAGES_PER_CLASS = 6
SINGLE_CLASSES = 30  # where the classes have one or two images
KEPT_PIXELS = 280  # of the shorter side; shown at about half of it


@dataclass(frozen=True)
class ContactRow:
    """A class: its title, the size of its training part, and pictures of it, RGB, true aspect."""

    title: str
    label: int
    num_images: int
    pictures: list[Image.Image]


def choose_rows(data_set: DataSet, seed: int = 0) -> tuple[list[ContactRow], list[str]]:
    """The rows in label order, and a sentence for each chosen sample that turned out to be damaged."""
    split: Split = "train" if "train" in data_set.splits else "val"
    labels = data_set.splits[split].index["label"]
    counts = np.bincount(labels, minlength=data_set.manifest.num_classes)
    present = np.flatnonzero(counts)
    generator = np.random.default_rng([seed, 1])
    per_class = IMAGES_PER_CLASS if np.median(counts[present]) >= 3 else 1
    num_classes = MAX_CLASSES if per_class > 1 else SINGLE_CLASSES
    chosen = np.sort(generator.permutation(present)[:num_classes])
    rows = []
    faults: list[str] = []
    for label in chosen.tolist():
        pictures = []
        for sample_id in generator.permutation(np.flatnonzero(labels == label))[:per_class].tolist():
            try:
                pictures.append(load_picture(data_set, split, sample_id))
            except DamagedSample as error:
                faults.append(str(error))
        rows.append(ContactRow(data_set.class_titles[label], label, int(counts[label]), pictures))
    return rows, faults


def load_picture(data_set: DataSet, split: Split, sample_id: int, side: int = KEPT_PIXELS) -> Image.Image:
    """A sample, its shorter side at most `side` pixels. DamagedSample where it cannot be decoded."""
    try:
        picture = Image.open(io.BytesIO(data_set.read(split, sample_id))).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DamagedSample(f"{data_set.describe(split, sample_id)} cannot be decoded ({error})") from None
    scale = side / min(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def jpeg_bytes(picture: Image.Image, quality: int = 82) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, subsampling=0 if quality > 85 else 2)
    return buffer.getvalue()


def justified(pictures: Sequence[Image.Image], width: int, max_height: int, gap: int) -> Image.Image:
    """Pictures of one height side by side, as high as fits `width` and `max_height`, pixels; on white."""
    if not pictures:
        return Image.new("RGB", (width, max_height), "white")
    aspects = [picture.width / picture.height for picture in pictures]
    height = max(1, min(max_height, int((width - gap * (len(pictures) - 1)) / sum(aspects))))
    strip = Image.new("RGB", (width, height), "white")
    left = 0
    for picture, aspect in zip(pictures, aspects, strict=True):
        size = (max(1, min(round(height * aspect), width - left)), height)
        strip.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, 0))
        left += size[0] + gap
        if left >= width:
            break
    return strip
