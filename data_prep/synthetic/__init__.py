"""The embedded data set: pictures drawn here and stored as ImageNet stores its own. No download.

    python -m data_prep generate --out data/synthetic-source

writes `train/<class>/<name>.JPEG` and `val/<class>/<name>.JPEG`, ten classes of objects in random colours,
light, size, angle and clutter. The files are as mixed as in a real archive: sides of 200 to 500 pixels,
several qualities and subsamplings, some progressive, some grey, and ten that are not what their name says,
six of them beyond use (STRANGE). So every step of the pipeline has something to do.

A picture is a pure function of (seed, class, index): neither the number of workers nor of images changes a
byte, and a small set is a part of a larger one. Colours, contrast and the area an object covers are drawn
without regard to its class, so that only its form tells it.

Example:
    >>> generate(Path("data/synthetic-source"), seed=0)  # returns at once when called again
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.synthetic.forms import CLASSES, Rng
from data_prep.synthetic.painting import draw

GENERATOR_VERSION = 1  # raise it with any change of the pictures
VAL_EVERY = 5  # every fifth image of a class belongs to val
DESCRIPTION = "dataset.json"

# One strange file a class, in class order, and its index there. Normalisation can use the first four; the
# others are beyond use. All but one PNG are in train, so that val keeps its number of images.
STRANGE = ("png", "png", "png", "cmyk", "truncated", "truncated", "empty", "text", "zeroed", "damaged")
STRANGE_INDEX = (2, 2, 4, 2, 2, 2, 2, 2, 2, 2)


def _encode(picture: Image.Image, rng: Rng) -> bytes:
    """A JPEG as one camera or web site or another would have stored it."""
    if rng.random() < 0.03:
        picture = picture.convert("L")
    quality, progressive = int(rng.integers(75, 97)), bool(rng.random() < 0.12)
    sampling = "4:2:0" if rng.random() < 0.7 else "4:4:4"
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=sampling, progressive=progressive)
    return file.getvalue()


def _strange(kind: str, picture: Image.Image, jpeg: bytes) -> bytes:
    """What a strange file holds instead of the picture's JPEG."""
    half = jpeg[: len(jpeg) // 2]
    faulty = {
        "truncated": half,
        "empty": b"",
        "text": b"<html><head><title>404 Not Found</title></head></html>\n",
        "zeroed": bytes(len(jpeg)),
        "damaged": half + jpeg,  # a broken download that started over instead of going on
    }
    if kind in faulty:
        return faulty[kind]
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    else:
        picture.convert("CMYK").save(file, "JPEG", quality=90)
    return file.getvalue()


def _write(task: tuple[Path, int, int, int]) -> None:
    """Write the file of one (root, seed, label, index). The folders are there."""
    root, seed, label, index = task
    rng = np.random.default_rng([seed, label, index])
    picture = draw(label, rng)
    content = _encode(picture, rng)
    if index == STRANGE_INDEX[label]:
        content = _strange(STRANGE[label], picture, content)
    split = "val" if index % VAL_EVERY == VAL_EVERY - 1 else "train"
    name = CLASSES[label]
    (root / split / name / f"{name}_{index:05d}.JPEG").write_bytes(content)


def generate(
    out: Path, seed: int = 0, num_images: int = 2000, workers: int | None = None, progress: bool = True
) -> None:
    """Write the data set of `seed` to `out`, or return at once where it is already complete.

    Each class gets a tenth of the images, a fifth of them in val. Files are written to `<out>.partial`, which
    is renamed when all are there: an interrupted call leaves no `out`, and the next one starts over.

    Args:
        out: folder to make; an empty one may exist.
        seed: 0 or more.
        num_images: files in all, the strange ones included; at least 50.
        workers: processes; by default one a core, 8 at most, as more would mostly start.
        progress: count the images on stderr.

    Raises:
        ValueError: `out` holds something else, or an argument is out of its range.
    """
    if num_images < VAL_EVERY * len(CLASSES):
        raise ValueError(f"num_images is {num_images}: give at least {VAL_EVERY * len(CLASSES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1")
    out = out.absolute()
    wanted = {"version": GENERATOR_VERSION, "seed": seed, "num_images": num_images}
    if _is_complete(out, wanted):
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "val"):
        for name in CLASSES:
            (partial / split / name).mkdir(parents=True)
    tasks = [(partial, seed, i % len(CLASSES), i // len(CLASSES)) for i in range(num_images)]
    for count, _ in enumerate(_write_all(tasks, workers), start=1):
        if progress and (count % 50 == 0 or count == num_images):
            end = "\n" if count == num_images else ""
            print(f"\rdrawing image {count:,} of {num_images:,}", end=end, file=sys.stderr, flush=True)
    (partial / DESCRIPTION).write_text(json.dumps({"generator": "data_prep.synthetic", **wanted}) + "\n")
    partial.replace(out)


def _write_all(tasks: list[tuple[Path, int, int, int]], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_write, tasks)
        return
    # Spawned, not forked: the caller may have threads (torch, OpenMP), which do not survive a fork. Ctrl-C is
    # the caller's: it ends the map, and without the tracebacks of all workers.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        yield from pool.map(_write, tasks, chunksize=8)


def _is_complete(out: Path, wanted: dict[str, int]) -> bool:
    """Whether `out` holds the wanted data set; ValueError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / DESCRIPTION).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{out} holds something else than generated images: choose another --out") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{out} holds generated images of {key} {found.get(key)}, not {value}: "
                "delete it or choose another --out"
            )
    return True
