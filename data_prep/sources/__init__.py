"""Source layouts: one file a layout that users really have, each yielding `Sample`s.

A layout module has a NAME, a one-line DESCRIPTION, `detect(root)`, and `list_files(root)`. To add one, write
the module and name it in LAYOUTS, most specific first.

Example:
    >>> source = open_source(Path("../shared/data/intel"))
    >>> source.description, len(source.samples)
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from data_prep.sources import category_in_filename, flat_folder, image_folder, intel
from data_prep.sources.files import SourceFile, files_in, subfolders

LAYOUTS: dict[str, ModuleType] = {
    module.NAME: module for module in (intel, category_in_filename, image_folder, flat_folder)
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Sample:
    """One source file with its place in the data set.

    Attributes:
        key: path below the source's root, with forward slashes; what quarantine and index call it.
        path: where its bytes are.
        label: ordinal of its class in the sorted class names.
        split: "train" or "val".
    """

    key: str
    path: Path
    label: int
    split: str

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Source:
    """A recognised source: its layout, class names in label order, and samples (by split, then key)."""

    layout: str
    description: str
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]

    def count(self, split: str) -> int:
        return sum(sample.split == split for sample in self.samples)


def open_source(root: Path, layout: str | None = None, val_fraction: float = 0.2, seed: int = 0) -> Source:
    """Recognise the layout of `root` (or take the named one) and list its samples.

    Args:
        root: folder with the source's files.
        layout: a name from LAYOUTS, or None to detect it.
        val_fraction: share of each class that goes to `val` where the layout has no split of its own.
        seed: of that split.

    Raises:
        ValueError: no such folder, no known layout, an empty class, fewer than two classes; the message
            says what to change.
    """
    if not root.exists():
        raise ValueError(f"source {root} does not exist: check --source")
    if not root.is_dir():
        raise ValueError(f"source {root} is a file: --source takes a folder")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction is {val_fraction}: it must be between 0 and 1")
    module = _choose_layout(root, layout)
    files, class_names = module.list_files(root)
    _check_classes(root, files, class_names)
    names = tuple(sorted(class_names))
    files = sorted(files, key=lambda file: file.key)
    splits, warnings = _assign_splits(files, val_fraction, seed)
    warnings += _loose_images(root, files)
    if "val" not in splits:
        warnings += ("there are no validation images: training will refuse this data set",)
    label_of = {name: label for label, name in enumerate(names)}
    samples = [
        Sample(file.key, file.path, label_of[file.class_name], split)
        for file, split in zip(files, splits, strict=True)
    ]
    samples.sort(key=lambda sample: (sample.split, sample.key))
    source = Source(module.NAME, module.DESCRIPTION, names, tuple(samples), warnings)
    _check_splits(source)
    return source


def _choose_layout(root: Path, layout: str | None) -> ModuleType:
    if layout is not None:
        if layout not in LAYOUTS:
            near = difflib.get_close_matches(layout, LAYOUTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(LAYOUTS)}"
            raise ValueError(f"--layout {layout} is not known: {hint}")
        return LAYOUTS[layout]
    for module in LAYOUTS.values():
        if module.detect(root):
            return module
    seen = sorted(entry.name for entry in root.iterdir())
    listing = ", ".join(seen[:5]) + (" …" if len(seen) > 5 else "") or "nothing"
    raise ValueError(
        f"no known layout in {root} (it holds {listing}): expected train/<class>/ and val/<class>/, or one "
        "folder a class; name it with --layout if you know it"
    )


def _check_classes(root: Path, files: list[SourceFile], class_names: set[str]) -> None:
    if len(class_names) < 2:
        inside = [f for f in subfolders(root) if any(m.detect(f) for m in LAYOUTS.values())]
        if len(inside) == 1:
            raise ValueError(
                f"{root} has only one folder, which looks like the data set: --source {inside[0]}"
            )
        found = f"only one class ({next(iter(class_names))})" if class_names else "no class"
        raise ValueError(f"{root} has {found}: a classifier needs at least two class folders with images")
    empty = sorted(class_names - {file.class_name for file in files})
    if empty:
        raise ValueError(
            f"class {empty[0]!r} in {root} has no files{_and_more(empty)}: add images or remove the folder"
        )


def _loose_images(root: Path, files: list[SourceFile]) -> tuple[str, ...]:
    """A warning about image files beside the class folders, which belong to no class."""
    taken = {file.path for file in files}
    loose = [
        path
        for folder in (root, *subfolders(root))
        for path in files_in(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and path not in taken
    ]
    if not loose:
        return ()
    return (f"{len(loose)} image files lie in no class folder and are left out (first: {loose[0]})",)


def _check_splits(source: Source) -> None:
    train_labels = {sample.label for sample in source.samples if sample.split == "train"}
    missing = sorted(set(range(len(source.class_names))) - train_labels)
    if missing:
        names = [source.class_names[label] for label in missing]
        raise ValueError(
            f"class {names[0]!r} has no training images{_and_more(names)}: add some to the train split, "
            "or remove the class"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _assign_splits(
    files: list[SourceFile], val_fraction: float, seed: int
) -> tuple[list[str], tuple[str, ...]]:
    """The split of each file: the layout's own, else seeded and stratified by class.

    A class too small to give one image to `val` and keep one stays wholly in `train`.
    """
    splits = [file.split or "train" for file in files]
    by_class: dict[str, list[int]] = {}
    for position, file in enumerate(files):
        if file.split is None:
            by_class.setdefault(file.class_name, []).append(position)
    unsplit = []
    for name, positions in by_class.items():
        num_val = round(len(positions) * val_fraction)
        if num_val == 0 or num_val == len(positions):
            unsplit.append(name)
            continue
        # Keyed by name, so that adding one class does not reshuffle the others.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = np.random.default_rng(np.frombuffer(digest, np.uint32))
        for position in generator.permutation(positions)[:num_val]:
            splits[position] = "val"
    if not unsplit:
        return splits, ()
    warning = (
        f"{len(unsplit)} of {len(by_class)} classes have too few images to give {val_fraction:.0%} to val "
        f"(first: {sorted(unsplit)[0]!r}); they stay wholly in train"
    )
    return splits, (warning,)
