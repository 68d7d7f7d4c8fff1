"""A prepared data set opened for reading: its manifest, sample indexes, keys and checked sample bytes.

Example:
    >>> data_set = open_data_set("data/intel")
    >>> jpeg = data_set.read("val", sample_id=7)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from data_prep.manifest import Manifest, SplitEntry, load_manifest, read_index, read_keys
from data_prep.storage import Folder, crc32c, open_folder

Split = Literal["train", "val"]


class DamagedSample(ValueError):
    """A stored sample is not what its index says; the message names it."""


@dataclass(frozen=True)
class SplitSamples:
    """One split: index of INDEX_DTYPE, shape (num_samples,), and the source key of each sample."""

    name: Split
    entry: SplitEntry
    index: np.ndarray
    keys: list[str]


@dataclass(frozen=True)
class DataSet:
    """A prepared data set in a folder or S3, its indexes in memory."""

    location: str
    folder: Folder
    manifest: Manifest
    splits: dict[Split, SplitSamples]

    @property
    def name(self) -> str:
        """The last part of its location."""
        return PurePosixPath(self.location.split("://")[-1].rstrip("/")).name or "data set"

    @property
    def num_samples(self) -> int:
        return sum(len(split.index) for split in self.splits.values())

    @property
    def num_bytes(self) -> int:
        """Size of all its files on the disk, bytes."""
        return sum(file.bytes for split in self.manifest.splits.values() for file in split.files)

    @cached_property
    def class_titles(self) -> list[str]:
        """What people call the classes, in label order; with their names where two are called the same."""
        names = self.manifest.class_names
        shown = self.manifest.display_names or names
        uses = Counter(shown)
        return [
            title if uses[title] == 1 else f"{title} ({name})"
            for title, name in zip(shown, names, strict=True)
        ]

    def describe(self, split: Split, sample_id: int) -> str:
        return f"sample {sample_id} of split {split} ({self.splits[split].keys[sample_id]!r})"

    def read(self, split: Split, sample_id: int) -> bytes:
        """The JPEG of a sample. DamagedSample: its CRC-32C differs. ValueError: the shard is missing."""
        samples = self.splits[split]
        row = samples.index[sample_id]
        shard = samples.entry.shards[int(row["shard"])]
        jpeg = read_shard(self.folder, shard.name, int(row["offset"]), int(row["length"]))
        if crc32c(jpeg) != row["crc32c"]:
            raise DamagedSample(f"{self.describe(split, sample_id)} is damaged (its CRC-32C differs)")
        return jpeg


def read_shard(folder: Folder, name: str, offset: int, length: int) -> bytes:
    """Bytes of a shard. ValueError where it is missing."""
    try:
        return folder.read(name, offset, length)
    except FileNotFoundError:
        raise ValueError(f"{folder.path_of(name)} is missing: copy it again") from None


def open_data_set(location: str) -> DataSet:
    """Open the data set in a folder or at `s3://bucket/prefix`.

    Raises:
        ValueError: there is none, or its index or keys do not fit its manifest.
    """
    folder = open_folder(location)
    manifest = load_manifest(folder)
    splits: dict[Split, SplitSamples] = {}
    for name, entry in manifest.splits.items():
        index = read_index(folder, manifest, name)
        keys = read_keys(folder, manifest, name)
        counts = np.bincount(index["label"].clip(0), minlength=manifest.num_classes)
        if (index["label"] < 0).any() or counts.tolist() != list(entry.class_counts):
            raise ValueError(f"{folder.location}: the labels of split {name} do not add up to its manifest")
        if len(keys) != len(index) or (len(index) and int(index["shard"].max()) >= len(entry.shards)):
            raise ValueError(f"{folder.location}: keys or shards of split {name} do not fit its index")
        splits[name] = SplitSamples(name, entry, index, keys)
    return DataSet(folder.location, folder, manifest, splits)
