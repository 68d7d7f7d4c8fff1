"""Source layouts: one file a layout that users really have, each yielding `Sample`s.

A layout module has a NAME, a one-line DESCRIPTION, `detect(tree)`, and `list_files(tree)` → `Listing`. To add
one, write the module and name it in LAYOUTS, most specific first. A layout sees a `SourceTree`: a folder, an
S3 prefix, a zip or a tar look the same to it.

Example:
    >>> source = open_source("../shared/data/intel")
    >>> source.description, len(source.samples)
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from data_prep.sources import (
    category_in_filename,
    cifar,
    flat_folder,
    huggingface_parquet,
    ilsvrc,
    image_folder,
    intel,
    kaggle_cls_loc,
    places_list,
    tiny_imagenet,
    webdataset,
)
from data_prep.sources.listing import Listing, Sample, first_few, is_image
from data_prep.sources.tree import ListedTree, SourceTree, open_tree, readable
from data_prep.sources.wordnet import wordnet_names

__all__ = ["LAYOUTS", "Sample", "Source", "open_source"]

LAYOUTS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        ilsvrc,
        kaggle_cls_loc,
        tiny_imagenet,
        cifar,
        intel,
        category_in_filename,
        places_list,
        huggingface_parquet,
        webdataset,
        image_folder,
        flat_folder,
    )
}


MAX_DESCENT = 3  # folders that hold one folder only


@dataclass(frozen=True)
class Source:
    """A recognised source: its layout, class names in label order, and samples (by split, then key).

    Attributes:
        display_names: what people call the classes, in label order; the class name where nothing is known.
    """

    layout: str
    description: str
    class_names: tuple[str, ...]
    display_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]

    def count(self, split: str) -> int:
        return sum(sample.split == split for sample in self.samples)


def open_source(
    location: str | Path,
    layout: str | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    classes: tuple[str, ...] = (),
    max_per_class: int | None = None,
) -> Source:
    """Recognise the layout of a source (or take the named one) and list its samples.

    Args:
        location: folder, zip or tar with the source's files, or `s3://bucket/prefix`.
        layout: a name from LAYOUTS, or None to detect it.
        val_fraction: share of each class that goes to `val` where the layout has no split of its own.
        seed: of that split, and of the choice that `max_per_class` makes.
        classes: take only these (class or display names); () for all.
        max_per_class: take at most so many images of each class in each split.

    Raises:
        ValueError: no such source, no known layout, an empty class, fewer than two classes; the message
            says what to change.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction is {val_fraction}: it must be between 0 and 1")
    if max_per_class is not None and max_per_class < 1:
        raise ValueError(f"--max-per-class is {max_per_class}: it must be at least 1")
    tree = open_tree(str(location))
    module, tree = _choose_layout(tree, layout)
    listing: Listing = module.list_files(tree)
    display = {**wordnet_names(listing.class_names), **listing.display_names}
    if classes:
        listing = _select_classes(listing, classes, display)
    _check_classes(tree, listing)
    listing.samples.sort(key=lambda sample: sample.key)
    warnings = (*listing.warnings, *_assign_splits(listing.samples, val_fraction, seed))
    if listing.by_folder and not classes:
        warnings += _loose_images(tree, listing.samples)
    if max_per_class is not None:
        listing.samples = _at_most(listing.samples, max_per_class, seed)
    if not any(sample.split == "val" for sample in listing.samples):
        warnings += ("there are no validation images: training will refuse this data set",)
    names = tuple(sorted(listing.class_names))
    label_of = {name: label for label, name in enumerate(names)}
    for sample in listing.samples:
        sample.label = label_of[sample.class_name]
    samples = tuple(sorted(listing.samples, key=lambda sample: (sample.split, sample.key)))
    display_names = tuple(display.get(name, name) for name in names)
    source = Source(module.NAME, module.DESCRIPTION, names, display_names, samples, warnings)
    _check_splits(source)
    return source


def _choose_layout(tree: SourceTree, layout: str | None) -> tuple[ModuleType, SourceTree]:
    """The layout and the tree it is to list: an archive's only folder, where that is the data set."""
    if layout is not None:
        if layout not in LAYOUTS:
            near = difflib.get_close_matches(layout, LAYOUTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(LAYOUTS)}"
            raise ValueError(f"--layout {layout} is not known: {hint}")
        module = LAYOUTS[layout]
        inner = tree
        for _ in range(MAX_DESCENT if isinstance(tree, ListedTree) else 0):
            if _fits(module, inner) or len(inner.subfolders()) != 1:
                break
            inner = inner.inside(inner.subfolders()[0])
        return module, inner if _fits(module, inner) else tree
    found = next((module for module in LAYOUTS.values() if module.detect(tree)), None)
    if found is None or not _fits(found, tree):
        inside = _data_set_inside(tree)
        if inside is not None and isinstance(tree, ListedTree):
            return inside
        if inside is not None:
            raise ValueError(_one_too_high(tree, inside[1]))
    if found is not None:
        return found, tree
    seen = sorted(tree.subfolders() + tree.files_in())
    listing = ", ".join(map(readable, seen[:5])) + (" …" if len(seen) > 5 else "") or "nothing"
    raise ValueError(
        f"no known layout in {tree.location} (it holds {listing}): expected train/<class>/ and val/<class>/, "
        f"or one folder a class; name it with --layout if you know it ({', '.join(LAYOUTS)})"
    )


def _fits(module: ModuleType, tree: SourceTree) -> bool:
    # A single folder cannot be the classes: the data set may be in it.
    return module.detect(tree) and not (module is flat_folder and len(tree.subfolders()) < 2)


def _data_set_inside(tree: SourceTree) -> tuple[ModuleType, SourceTree] | None:
    """The data set in the only folder of a tree (or in that one's): archives and unpacked ones are so."""
    inner = tree
    for _ in range(MAX_DESCENT):
        folders = inner.subfolders()
        if len(folders) != 1:
            return None
        inner = inner.inside(folders[0])
        for module in LAYOUTS.values():
            if _fits(module, inner):
                return module, inner
    return None


def _one_too_high(tree: SourceTree, inside: SourceTree) -> str:
    return f"{tree.location} has only one folder, which looks like the data set: --source {inside.location}"


def _select_classes(listing: Listing, wanted: tuple[str, ...], display: dict[str, str]) -> Listing:
    # What comes first wins: a class's own name, all that people call it, one of several such names.
    ways: tuple[dict[str, set[str]], ...] = ({name: {name} for name in listing.class_names}, {}, {})
    for name in listing.class_names & display.keys():
        ways[1].setdefault(display[name], set()).add(name)
        for synonym in display[name].split(","):
            ways[2].setdefault(synonym.strip(), set()).add(name)
    chosen = set()
    for name in wanted:
        found = sorted(next((way[name] for way in ways if name in way), ()))
        if not found:
            near = difflib.get_close_matches(name, dict.fromkeys(key for way in ways for key in way), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {len(listing.class_names)} classes"
            raise ValueError(f"--classes: the source has no class {name!r}; {hint}")
        if len(found) > 1:
            meant = first_few([f"{candidate} ({display[candidate]})" for candidate in found])
            raise ValueError(f"--classes: {name!r} may be any of {meant}: name the class itself")
        chosen.add(found[0])
    samples = [sample for sample in listing.samples if sample.class_name in chosen]
    return replace(listing, samples=samples, class_names=chosen)


def _check_classes(tree: SourceTree, listing: Listing) -> None:
    class_names = listing.class_names
    if len(class_names) < 2:
        inside = _data_set_inside(tree)
        if inside is not None:
            raise ValueError(_one_too_high(tree, inside[1]))
        found = f"only one class ({next(iter(class_names))})" if class_names else "no class"
        raise ValueError(
            f"{tree.location} has {found}: a classifier needs at least two class folders with images"
            + "".join(f" ({warning})" for warning in listing.warnings)
        )
    empty = sorted(class_names - {sample.class_name for sample in listing.samples})
    if empty:
        raise ValueError(
            f"class {empty[0]!r} in {tree.location} has no files{_and_more(empty)}: add images or remove "
            "the folder"
        )


def _loose_images(tree: SourceTree, samples: list[Sample]) -> tuple[str, ...]:
    """A warning about image files beside the class folders, which belong to no class."""
    taken = {sample.key for sample in samples}
    folders = ["", *tree.subfolders()]
    paths = [f"{folder}/{name}" if folder else name for folder in folders for name in tree.files_in(folder)]
    loose = [path for path in paths if is_image(path) and readable(path) not in taken]
    if not loose:
        return ()
    first = f"{tree.location}/{readable(loose[0])}"
    return (f"{len(loose)} image files lie in no class folder and are left out (first: {first})",)


def _at_most(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """A seeded choice of at most `limit` samples of each class in each split; keeps the order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault((sample.split or "", sample.class_name), []).append(position)
    kept: list[int] = []
    for (split, name), positions in groups.items():
        generator = _generator(seed, f"{split}:{name}")
        kept += [positions[i] for i in generator.permutation(len(positions))[:limit]]
    return [samples[position] for position in sorted(kept)]


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


def _assign_splits(samples: list[Sample], val_fraction: float, seed: int) -> tuple[str, ...]:
    """Give every sample its split: the layout's own, else seeded and stratified by class.

    A class too small to give one image to `val` and keep one stays wholly in `train`.
    """
    by_class: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.split is None:
            by_class.setdefault(sample.class_name, []).append(sample)
    too_few: dict[str, list[str]] = {}
    for name, members in by_class.items():
        num_val = round(len(members) * val_fraction)
        if num_val == 0 or num_val == len(members):
            aim = (
                f"give {val_fraction:.4g} of them to val" if num_val == 0 else "keep one in train beside val"
            )
            too_few.setdefault(aim, []).append(name)
            num_val = 0
        # Keyed by name, so that adding one class does not reshuffle the others.
        in_val = set(_generator(seed, name).permutation(len(members))[:num_val].tolist())
        for position, sample in enumerate(members):
            sample.split = "val" if position in in_val else "train"
    return tuple(
        f"{len(names)} of {len(by_class)} classes have too few images to {aim} (first: {min(names)!r}); they "
        "stay wholly in train"
        for aim, names in too_few.items()
    )


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
