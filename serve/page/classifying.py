"""What the page does with images: one of them with an explanation, many of them as rows.

Example:
    >>> result = classify_one(shelf.open("mine"), photo_bytes)
    >>> result.names[0], result.probabilities[0]
    ('glacier', 0.93)
"""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.page.heat import picture
from serve.page.models import ShownModel
from serve.portable.decoding import decode
from serve.portable.limits import BadImage
from serve.portable.model_info import ModelInfo
from serve.portable.texts import as_cell

TOP = 5
BATCH = 16
THUMBNAIL_SIDE = 96


@dataclass(frozen=True)
class Seen:
    """A classified image: its most probable classes, and what is needed to explain them."""

    pixels: NDArray[np.uint8]
    prepared: NDArray[np.uint8]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A file of many: its classes, or what is wrong with it."""

    file: str
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str = ""
    thumbnail: str = field(default="", repr=False)  # data: URI


def shown_names(info: ModelInfo) -> tuple[str, ...]:
    """What classes are called; those that share a name get the class name, or else the label, beside it."""
    counts = Counter(info.names)
    if len(counts) == len(info.names):
        return info.names
    technical = info.class_names if info.display_names else tuple(map(str, range(len(info.names))))
    return tuple(
        f"{name} ({technical[label]})" if counts[name] > 1 else name for label, name in enumerate(info.names)
    )


def look_at(model: ShownModel, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes of an image file → (pixels of the whole image, the model's input).

    Raises:
        BadImage: they cannot be used; one sentence.
    """
    steps = model.classifier.info.preprocessing
    pixels = decode(
        content,
        model.classifier.limits,
        apply_exif=steps.apply_exif,
        cap=steps.resolution_cap,
        cap_side=steps.cap_side,
    )
    return pixels, steps.crop(pixels)


def classify_one(model: ShownModel, content: bytes) -> Seen:
    """The five most probable classes of an image file. Raises BadImage as `look_at`."""
    pixels, prepared = look_at(model, content)
    (found,) = model.classifier.predict(prepared[None], TOP)
    names = shown_names(model.classifier.info)
    return Seen(
        pixels, prepared, found.labels, tuple(names[label] for label in found.labels), found.probabilities
    )


def explain(model: ShownModel, seen: Seen, label: int) -> NDArray[np.uint8]:
    """The image with what speaks for a class, or just with the square the model sees."""
    heat = None if model.heat is None else model.heat(seen.prepared, label)
    return picture(seen.pixels, model.classifier.info.preprocessing.crop_ratio, heat)


def classify_many(
    model: ShownModel,
    files: Sequence[tuple[str, Path]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """A row a file, in their order. A file that cannot be used costs its own row only.

    Args:
        files: (name to show, where it is). progress: told (files done, files).
    """
    rows: list[Row] = []
    for begin in range(0, len(files), BATCH):
        progress(begin, len(files))
        rows += _classify_batch(model, files[begin : begin + BATCH])
    return rows


def _classify_batch(model: ShownModel, files: Sequence[tuple[str, Path]]) -> Iterator[Row]:
    inputs: list[NDArray[np.uint8]] = []
    thumbnails: list[str] = []
    problems: dict[int, str] = {}
    for position, (_, path) in enumerate(files):
        try:
            pixels, prepared = look_at(model, path.read_bytes())
        except BadImage as error:
            problems[position] = str(error)
        except OSError:
            problems[position] = "The file is gone: choose it again."
        else:
            inputs.append(prepared)
            thumbnails.append(_thumbnail(pixels))
    found = iter(model.classifier.predict(np.stack(inputs), TOP)) if inputs else iter(())
    names, pictures = shown_names(model.classifier.info), iter(thumbnails)
    for position, (name, _) in enumerate(files):
        if position in problems:
            yield Row(name, problem=problems[position])
        else:
            prediction = next(found)
            yield Row(
                name,
                tuple(names[label] for label in prediction.labels),
                prediction.probabilities,
                thumbnail=next(pictures),
            )


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_csv(rows: Sequence[Row]) -> str:
    """`file, class_1, probability_1, …, problem`: a line a file, those that failed too.

    A name that a spreadsheet would take for a formula begins with an apostrophe.
    """
    num_classes = max((len(row.names) for row in rows), default=0) or 1
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ranks = range(1, num_classes + 1)
    writer.writerow(
        ["file", *(name for rank in ranks for name in (f"class_{rank}", f"probability_{rank}")), "problem"]
    )
    for row in rows:
        pairs = [
            cell
            for name, value in zip(row.names, row.probabilities, strict=True)
            for cell in (as_cell(name), f"{value:.6f}")
        ]
        writer.writerow([as_cell(row.file), *pairs, *[""] * (2 * num_classes - len(pairs)), row.problem])
    return buffer.getvalue()
