"""What a layout finds: samples with their classes, and the names people know the classes by."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from data_prep.sources.blobs import Blob
from data_prep.sources.tree import SourceTree, readable


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
    """

    samples: list[Sample]
    class_names: set[str] = field(default_factory=set)
    display_names: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.class_names = self.class_names or {sample.class_name for sample in self.samples}

    def joined(self, other: Listing) -> Listing:
        return Listing(
            self.samples + other.samples,
            self.class_names | other.class_names,
            {**self.display_names, **other.display_names},
            self.warnings + other.warnings,
        )


def class_folders(
    tree: SourceTree, folder: str, split: str | None, ignore: frozenset[str] = frozenset()
) -> Listing:
    """Files of `folder/<class>/**`, and the names of its class folders (empty ones too)."""
    samples, class_names = [], set()
    for name in tree.subfolders(folder):
        if name in ignore:
            continue
        class_name = sys.intern(readable(name))
        class_names.add(class_name)
        samples += [
            Sample(readable(path), tree.blob(path), class_name, split)
            for path in tree.files_below(f"{folder}/{name}" if folder else name)
        ]
    return Listing(samples, class_names)
