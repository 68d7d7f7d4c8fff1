"""CIFAR-10 and CIFAR-100 as their authors give them: raw pixels in a few batch files.

    cifar-10-batches-py/       data_batch_1 … data_batch_5, test_batch, batches.meta      (pickles)
    cifar-10-batches-bin/      data_batch_1.bin …, test_batch.bin, batches.meta.txt
    cifar-100-python/          train, test, meta                                          (pickles)
    cifar-100-binary/          train.bin, test.bin, fine_label_names.txt

The test batch is val. The source is such a folder, or one that holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.sources.blobs import Blob, BytesBlob, PixelsBlob, ppm_of_planes
from data_prep.sources.listing import Listing, Sample, names_of_labels, read_lines
from data_prep.sources.tree import SourceTree
from data_prep.sources.unpickle import PickledArray, load_pickle

NAME = "cifar"
DESCRIPTION = "CIFAR-10 or CIFAR-100: batch files of raw 32×32 pixels"
SIDE = 32
IMAGE_BYTES = 3 * SIDE * SIDE
MAX_BATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class _Version:
    """One of the four forms.

    Attributes:
        label_bytes: before each image of a binary file; the last one is the label. 0: the files are pickles.
        label_key, names_key: in the pickles.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int = 0
    label_key: str = ""
    names_key: str = ""


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = (
    _Version("cifar-10-batches-py", BATCHES, "test_batch", "batches.meta", 0, "labels", "label_names"),
    _Version(
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
        label_bytes=1,
    ),
    _Version("cifar-100-python", ("train",), "test", "meta", 0, "fine_labels", "fine_label_names"),
    _Version("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2),
)


def detect(tree: SourceTree) -> bool:
    return _find(tree) is not None


def _find(tree: SourceTree) -> tuple[_Version, str] | None:
    """The form, and its folder ("" for the source itself)."""
    for version in VERSIONS:
        for folder in (version.folder, ""):
            files = set(tree.files_in(folder))
            # A file named train or test alone says little.
            if files >= {version.train[0], version.names} or files >= {version.train[0], version.test}:
                return version, folder
    return None


def list_files(tree: SourceTree) -> Listing:
    """All images with class and split. ValueError: a batch file is missing, damaged, or no batch file."""
    found = _find(tree)
    if found is None:
        raise ValueError(f"{tree.location} holds no CIFAR batch files: name another --layout")
    version, folder = found
    start = f"{folder}/" if folder else ""
    present = set(tree.files_in(folder))
    missing = [name for name in (*version.train, version.test) if name not in present]
    if missing:
        raise ValueError(f"{tree.location}/{start}{missing[0]} is missing: unpack the archive again")
    blobs: list[Blob] = []
    keys: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    for name in (*version.train, version.test):
        read = _read_binary if version.label_bytes else _read_pickled
        batch_labels, batch_blobs = read(tree, start + name, version)
        labels += batch_labels
        blobs += batch_blobs
        keys += [f"{start}{name}/{row:05d}" for row in range(len(batch_labels))]
        splits += ["val" if name == version.test else "train"] * len(batch_labels)
    names = names_of_labels(labels, _names(tree, start, version), f"{tree.location}/{start}{version.names}")
    rows = zip(keys, blobs, labels, splits, strict=True)
    return Listing([Sample(key, blob, names[label], split) for key, blob, label, split in rows])


def _names(tree: SourceTree, start: str, version: _Version) -> Sequence[str] | None:
    path = start + version.names
    if not tree.is_file(path):
        return None
    if version.label_bytes:
        return [line.strip() for line in read_lines(tree, path)]
    where = f"{tree.location}/{path}"
    names = load_pickle(tree.read(path), where).get(version.names_key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise ValueError(f"{where} has no list {version.names_key}: unpack the archive again")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]


def _read_binary(tree: SourceTree, path: str, version: _Version) -> tuple[list[int], list[Blob]]:
    content = tree.read(path, MAX_BATCH_BYTES)
    record = version.label_bytes + IMAGE_BYTES
    if not content or len(content) % record:
        raise ValueError(
            f"{tree.location}/{path} has {len(content):,} bytes, no multiple of {record:,}: it is cut off; "
            "unpack the archive again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    offsets = [row * record + version.label_bytes for row in range(len(rows))]
    return rows[:, version.label_bytes - 1].tolist(), _blobs(tree, path, content, offsets)


def _read_pickled(tree: SourceTree, path: str, version: _Version) -> tuple[list[int], list[Blob]]:
    where = f"{tree.location}/{path}"
    content = tree.read(path, MAX_BATCH_BYTES)
    batch = load_pickle(content, where)
    pixels, labels = batch.get("data"), batch.get(version.label_key)
    if not isinstance(pixels, PickledArray) or not isinstance(labels, list):
        raise ValueError(f"{where} is no CIFAR batch (no data or no {version.label_key}): unpack it again")
    if not all(type(label) is int for label in labels):
        raise ValueError(f"{where} has a label that is no number: unpack the archive again")
    raw = pixels.content
    if (
        pixels.dtype != "u1"
        or pixels.shape != (len(labels), IMAGE_BYTES)
        or len(raw) != len(labels) * IMAGE_BYTES
        or pixels.is_fortran
    ):
        raise ValueError(
            f"{where} has {len(labels)} labels for an array of {pixels.dtype} {pixels.shape}: expected "
            f"bytes, {IMAGE_BYTES} an image; unpack the archive again"
        )
    # The array's bytes stand in the pickle as they are, unless a rare protocol encoded them.
    first = content.find(raw[:IMAGE_BYTES]) if raw else -1
    while first >= 0 and content[first : first + len(raw)] != raw:
        first = content.find(raw[:IMAGE_BYTES], first + 1)
    if first < 0:
        return labels, _in_memory(raw, range(0, len(raw), IMAGE_BYTES))
    return labels, _blobs(tree, path, content, range(first, first + len(raw), IMAGE_BYTES))


def _blobs(tree: SourceTree, path: str, content: bytes, offsets: Sequence[int]) -> list[Blob]:
    """The images at `offsets` of a file: as ranges of it, or where a zip allows none, in memory."""
    try:
        location, start, _, version = tree.container(path)
    except ValueError:
        return _in_memory(content, offsets)
    version = sys.intern(version)
    return [PixelsBlob(location, start + offset, SIDE, SIDE, version) for offset in offsets]


def _in_memory(content: bytes, offsets: Sequence[int]) -> list[Blob]:
    return [BytesBlob(ppm_of_planes(content[at : at + IMAGE_BYTES], SIDE, SIDE)) for at in offsets]
