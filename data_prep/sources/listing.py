"""What a layout finds: samples with their classes, and the names people know the classes by.

Also what several layouts need to find it: splits and labels by name, a look around a tree.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from data_prep.normalize import image_kind
from data_prep.sources.blobs import Blob
from data_prep.sources.tree import SourceTree, readable

# What people call images, those that are not read among them: they end in the quarantine, not in silence.
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
    *(".heic", ".heif", ".avif"),
}
NUM_PEEKED = 3  # files of a folder
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(slots=True)
class Sample:
    """One source image with its place in the data set.

    Attributes:
        key: its name in the source, with forward slashes; what quarantine and index call it.
        blob: where its bytes are.
        class_name: its class.
        split: "train" or "val"; None from a layout that has no split, until one is assigned.
        label: ordinal of its class in the sorted class names; -1 until the classes are known.
    """

    key: str
    blob: Blob
    class_name: str
    split: str | None
    label: int = -1

    def read(self) -> bytes:
        return self.blob.read()


@dataclass
class Listing:
    """All that a layout knows of a source.

    Attributes:
        samples: in any order.
        class_names: also those without a sample (an empty folder); {} stands for those of the samples.
        display_names: class name → the name people know it by, where the source tells.
        warnings: sentences for the user.
        by_folder: folders give the classes, so that an image beside them would be a mistake to warn of.
    """

    samples: list[Sample]
    class_names: set[str] = field(default_factory=set)
    display_names: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    by_folder: bool = False

    def __post_init__(self) -> None:
        self.class_names = self.class_names or {sample.class_name for sample in self.samples}

    def joined(self, other: Listing) -> Listing:
        return Listing(
            self.samples + other.samples,
            self.class_names | other.class_names,
            {**self.display_names, **other.display_names},
            self.warnings + other.warnings,
            self.by_folder or other.by_folder,
        )


def class_folders(
    tree: SourceTree, folder: str, split: str | None, ignore: frozenset[str] = frozenset()
) -> Listing:
    """Files of `folder/<class>/**`, and the names of its class folders (empty ones too)."""
    samples, class_names, left_out = [], set(), []
    for name in tree.subfolders(folder):
        if name in ignore:
            continue
        place = f"{folder}/{name}" if folder else name
        paths = tree.files_below(place)
        if paths and not _holds_images(tree, paths):
            left_out.append(readable(place))
            continue
        class_name = sys.intern(readable(name))
        class_names.add(class_name)
        samples += [Sample(readable(path), tree.blob(path), class_name, split) for path in paths]
    warnings = []
    if left_out:
        warnings.append(f"left out, since no file in it looks like an image: {first_few(left_out)}")
    return Listing(samples, class_names, warnings=warnings, by_folder=True)


def _holds_images(tree: SourceTree, paths: list[str]) -> bool:
    """Whether any file is named as an image, or one of the first few begins as one.

    A folder of notes beside the classes is no class; one of damaged images is, and has its quarantine.
    """
    if any(is_image(path) for path in paths):
        return True
    for path in paths[:NUM_PEEKED]:
        try:
            if image_kind(tree.blob(path).read()) is not None:
                return True
        except (OSError, RuntimeError, ValueError):
            continue  # cannot be read; then it is no sign of images
    return False


def first_few(names: list[str]) -> str:
    """The first three of some names, for messages."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_image(name: str) -> bool:
    """Whether a name ends as an image's."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def split_in_name(path: str) -> str | None:
    """ "train", "val" or "test" where a file's name says so, or else one of its folders'; None elsewhere."""
    for part in reversed(path.split("/")):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def settle_splits(found: Iterable[str | None]) -> dict[str | None, str | None]:
    """What becomes of the splits that were found: "train", "val", or None for a share of each class.

    A test split serves as `val` where there is none, else it is not in the result: left out.
    """
    splits = set(found)
    val = next((name for name in ("val", "test") if name in splits), None)
    settled: dict[str | None, str | None] = dict.fromkeys((None, "train"), "train" if val else None)
    if val:
        settled[val] = "val"
    return {name: split for name, split in settled.items() if name in splits}


def names_of_labels(labels: Iterable[int], names: Sequence[str] | None, origin: str) -> dict[int, str]:
    """The class name of each label: its name in `names`, else its zero-padded number.

    Names that several labels share get their label too, since classes must not melt into one.

    Raises:
        ValueError: a label is negative or beyond `names`; the message names `origin`, the list's file.
    """
    present = sorted(set(labels))
    if present and present[0] < 0:
        raise ValueError(f"{origin}: there is a label {present[0]}, but labels start at 0: mend it")
    if names is None:
        width = len(str(present[-1])) if present else 1
        return {label: f"{label:0{width}d}" for label in present}
    if present and present[-1] >= len(names):
        raise ValueError(
            f"{origin} names {len(names)} classes, but there is a label {present[-1]}: add its name"
        )
    often = Counter(names)
    return {
        label: sys.intern(names[label] if often[names[label]] == 1 else f"{names[label]} ({label})")
        for label in present
    }


def read_lines(tree: SourceTree, path: str) -> list[str]:
    """The lines of a small text file that are not empty. ValueError: it is too large, or no text."""
    try:
        text = tree.read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{tree.location}/{readable(path)} is no UTF-8 text: is it damaged?") from None
    return [line for line in text.splitlines() if line.strip()]


def near_folders(tree: SourceTree, depth: int = 2, most: int = 20) -> Iterator[str]:
    """The root and the folders not far below, nearest first; of a thousand folders only `most`."""
    level = [""]
    for remaining in range(depth, -1, -1):
        yield from level
        if remaining:
            level = [
                f"{parent}/{name}" if parent else name
                for parent in level[:most]
                for name in tree.subfolders(parent)[:most]
            ]


def holds_class_folders(tree: SourceTree) -> bool:
    """Whether images lie in two folders or more, as with a folder a class."""
    num_folders = 0
    for folder in near_folders(tree):
        num_folders += bool(folder) and any(is_image(name) for name in tree.files_in(folder))
        if num_folders == 2:
            return True
    return False
