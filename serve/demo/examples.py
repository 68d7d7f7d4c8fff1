"""Images for visitors to try: of a folder, or validation images of the model's own data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.manifest import load_manifest
from evaluation.stored_images import StoredImages
from serve.portable.decoding import image_kind

MAX_EXAMPLES = 12
FROM_DATA = 8


def example_files(folder: Path) -> list[Path]:
    """The first images of a folder, by name.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of example images")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and _is_image(path):
            found.append(path)
            if len(found) == MAX_EXAMPLES:
                break
    if not found:
        raise ValueError(f"{folder} holds no image that could be an example")
    return found


def examples_of_data(data: Path, scratch: Path, most: int = FROM_DATA) -> list[Path]:
    """One validation image of each of up to `most` classes, written into `scratch`; [] if none can be."""
    try:
        manifest, stored = load_manifest(data), StoredImages(data, "val")
        wanted = np.unique(np.linspace(0, manifest.num_classes - 1, most).round().astype(int))
        files = []
        for label in wanted:
            (samples,) = np.nonzero(stored.index["label"] == label)
            if len(samples):
                path = scratch / f"example_{label:04d}.jpg"
                path.write_bytes(stored.jpeg(int(samples[0])))
                files.append(path)
        return files
    except (ValueError, OSError, KeyError):
        return []  # of another version, or damaged: the page works without


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return image_kind(file.read(16)) is not None
