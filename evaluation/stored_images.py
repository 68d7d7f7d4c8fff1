"""The images of a split as they are stored: by sample id, with their place in the source.

Example:
    >>> stored = StoredImages(Path("data/intel"), "val")
    >>> stored.read(7).shape, stored.key(7)
    ((150, 150, 3), 'seg_test/sea/20072.jpg')
"""

from __future__ import annotations

import io
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.manifest import load_index, load_keys, load_manifest


class StoredImages:
    """Random access to the JPEGs of a local data set; shards are mapped, not read.

    Raises ValueError where the split is missing or does not fit its manifest.
    """

    def __init__(self, folder: Path, split: Literal["train", "val"]) -> None:
        self._folder, self._split = folder, split
        self._manifest = load_manifest(folder)
        self.index = load_index(folder, self._manifest, split)
        shards = self._manifest.splits[split].shards
        self._shards = [np.memmap(folder / shard.name, np.uint8, "r") for shard in shards]

    @property
    def index_sha256(self) -> str:
        """The fingerprint of the split: equal for the same images in the same order."""
        return self._manifest.splits[self._split].index.sha256

    def jpeg(self, sample_id: int) -> bytes:
        row = self.index[sample_id]
        offset = int(row["offset"])
        return self._shards[row["shard"]][offset : offset + int(row["length"])].tobytes()

    def read(self, sample_id: int) -> NDArray[np.uint8]:
        """uint8 (height, width, 3)."""
        picture = Image.open(io.BytesIO(self.jpeg(sample_id)), formats=["JPEG"])
        return np.asarray(picture.convert("RGB"))

    def key(self, sample_id: int) -> str:
        """Where the image came from: a path inside the source; empty where the list of keys is damaged."""
        return self._keys[sample_id] if sample_id < len(self._keys) else ""

    @cached_property
    def _keys(self) -> list[str]:
        try:
            keys = load_keys(self._folder, self._manifest, self._split)
        except (OSError, ValueError):
            return []  # a help to the reader, not worth a report
        return [str(key) for key in keys]
