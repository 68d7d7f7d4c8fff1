"""Images named in text lists: MiniPlaces, Places365.

    images/train/a/abbey/00000001.jpg
    data/train.txt              train/a/abbey/00000001.jpg 0
    data/val.txt                val/00000001.jpg 52
    data/categories.txt         /a/abbey 0

The lists may lie at the root, in `data/` or in `development_kit/data/`, and be called
places365_train_standard.txt and places365_val.txt; the images' root is found by looking for the first ones.
A label is a number, or a class name without spaces. Without categories the classes are called as the
folders of their training images.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.sources import image_folder
from data_prep.sources.blobs import MissingBlob
from data_prep.sources.listing import Listing, Sample, is_image, names_of_labels, near_folders, read_lines
from data_prep.sources.tree import SourceTree, readable

NAME = "places-list"
DESCRIPTION = "lists (train.txt, val.txt) of images and labels, as with MiniPlaces and Places365"
LISTS = {split: re.compile(rf"(places\d*_)?{split}(_\w+)?\.txt") for split in ("train", "val")}
CATEGORIES = re.compile(r"categories(_\w+)?\.txt")
MAX_LIST_BYTES = 1 << 30  # the challenge's list has 8 million lines
NUM_PROBES = 20
NUMBER = re.compile(r"[0-9]{1,9}")


class _Line(NamedTuple):
    """A line of a list: the image's path, and its label as it stands there."""

    path: str
    label: str


@dataclass(frozen=True)
class _Lists:
    folder: str
    train: str | None
    val: str | None
    categories: str | None


def detect(tree: SourceTree) -> bool:
    if image_folder.is_complete(tree):
        return False
    lists = _find_lists(tree)
    return bool(lists.train and lists.val) and all(
        _looks_like_list(tree, path) for path in (lists.train, lists.val) if path
    )


def _looks_like_list(tree: SourceTree, path: str) -> bool:
    with tree.open(path) as file:
        start = file.read(4096).decode("utf-8", "replace")
    fields = next((line for line in start.splitlines() if line.strip()), "").rsplit(None, 1)
    return len(fields) == 2 and is_image(fields[0].strip())


def _find_lists(tree: SourceTree) -> _Lists:
    """The first folder near the root that has a list of training images."""
    for folder in near_folders(tree):
        names = tree.files_in(folder)
        found: dict[str, str | None] = {}
        for kind, pattern in (*LISTS.items(), ("categories", CATEGORIES)):
            # The shortest: train.txt; of Places' two training sets the standard one, not the challenge's.
            matching = sorted(
                (name for name in names if pattern.fullmatch(name)),
                key=lambda name: (len(name), name),
            )
            found[kind] = f"{folder}/{matching[0]}".lstrip("/") if matching else None
        if found["train"]:
            return _Lists(folder, **found)
    return _Lists("", None, None, None)


def list_files(tree: SourceTree) -> Listing:
    """All listed images with class and split; those that are not there are to be quarantined.

    Raises:
        ValueError: a list is missing, empty or broken, or none of its images is there.
    """
    lists = _find_lists(tree)
    if lists.train is None:
        raise ValueError(f"{tree.location} has no train.txt with a line `path label` an image")
    lines = {"train": list(_read_list(tree, lists.train))}
    if lists.val:
        lines["val"] = list(_read_list(tree, lists.val))
    names, display_names = _class_names(tree, lists, lines)
    warnings: list[str] = []
    samples = []
    for split, listed in lines.items():
        root = _image_root(tree, lists, split, listed)
        # The tree's own texts become the samples' keys: one text an image.
        there = {path: path for path in tree.files_below(root)}
        seen, num_repeated = set(), 0
        for line in listed:
            path = f"{root}/{line.path}" if root else line.path
            path = there.get(path, path)
            if path in seen:
                num_repeated += 1
                continue
            seen.add(path)
            blob = tree.blob(path) if path in there else MissingBlob()
            samples.append(Sample(readable(path), blob, names[line.label], split if lists.val else None))
        if num_repeated:
            where = lists.train if split == "train" else lists.val
            warnings.append(
                f"{tree.location}/{where} names {num_repeated:,} images again: the first line counts"
            )
    return Listing(samples, set(), display_names, warnings)


def _read_list(tree: SourceTree, path: str) -> Iterator[_Line]:
    where = f"{tree.location}/{path}"
    num_lines = 0
    for number, raw in enumerate(io.BytesIO(tree.read(path, MAX_LIST_BYTES)), 1):
        # Names that are no UTF-8 look as the file system gives them.
        line = raw.decode("utf-8", "surrogateescape").strip()
        if not line:
            continue
        fields = line.rsplit(None, 1)
        if len(fields) != 2:
            raise ValueError(
                f"{where}, line {number}: expected `path label`, found {readable(line[:80])!r}: mend the list"
            )
        name = fields[0].rstrip().lstrip("/").removeprefix("./")
        if ".." in name.split("/"):
            raise ValueError(f"{where}, line {number}: {readable(name)} leads out of the images' folder")
        num_lines += 1
        yield _Line(name, sys.intern(readable(fields[1])))
    if not num_lines:
        raise ValueError(f"{where} is empty: expected a line `path label` an image")


def _image_root(tree: SourceTree, lists: _Lists, split: str, lines: list[_Line]) -> str:
    """The folder that the list's paths start from: the one where most of some of them are."""
    step = max(1, len(lines) // NUM_PROBES)
    probes = [line.path for line in lines[::step]]
    beside = [lists.folder, *(f"{lists.folder}/{name}" for name in tree.subfolders(lists.folder))]
    above = [f"{name}/{split}" for name in ("", "images", "data/images")]
    folders = ["images", "data/images", *beside, "", *tree.subfolders()[:50], *above]
    folders = list(dict.fromkeys(folder.strip("/") for folder in folders))
    hits = {
        folder: sum(tree.is_file(f"{folder}/{probe}".lstrip("/")) for probe in probes) for folder in folders
    }
    best = max(folders, key=lambda folder: hits[folder])
    if not hits[best]:
        raise ValueError(
            f"none of the files that the {split} list names is there (first: {readable(probes[0])}; looked "
            f"in {', '.join(folder or 'the source itself' for folder in folders[:6])}): put the images in "
            f"{tree.location}/images"
        )
    return best


def _class_names(
    tree: SourceTree, lists: _Lists, lines: dict[str, list[_Line]]
) -> tuple[dict[str, str], dict[str, str]]:
    """(label as listed → class name, class name → display name)."""
    texts = {line.label for listed in lines.values() for line in listed}
    if not all(NUMBER.fullmatch(text) for text in texts):
        return {text: text for text in texts}, {}
    numbers = {text: int(text) for text in texts}
    if lists.categories:
        listed_names = _read_categories(tree, lists.categories)
        unknown = sorted(set(numbers.values()) - listed_names.keys())
        if unknown:
            raise ValueError(f"{tree.location}/{lists.categories} does not name label {unknown[0]}: add it")
        names = {text: listed_names[number] for text, number in numbers.items()}
    else:
        folders = {(line.label, _class_folder(line.path)) for line in lines["train"]}
        by_label = dict(folders)
        unique = len(by_label) == len(folders) == len({name for _, name in folders})
        if unique and all(by_label.values()) and by_label.keys() == texts:
            names = by_label
        else:
            of_number = names_of_labels(numbers.values(), None, tree.location)
            names = {text: of_number[number] for text, number in numbers.items()}
    return names, {name: _spoken(name) for name in names.values()}


def _class_folder(path: str) -> str:
    """`train/a/abbey/00000001.jpg` → `a/abbey`."""
    folder = path.rpartition("/")[0]
    first, _, rest = folder.partition("/")
    return sys.intern(readable(rest if first in ("train", "images") else folder))


def _spoken(name: str) -> str:
    """`a/apartment_building/outdoor` → `apartment building, outdoor`."""
    initial, _, rest = name.partition("/")
    name = rest if len(initial) == 1 and rest else name
    return name.replace("_", " ").replace("/", ", ")


def _read_categories(tree: SourceTree, path: str) -> dict[int, str]:
    labels: dict[str, int] = {}
    for number, line in enumerate(read_lines(tree, path), 1):
        where = f"{tree.location}/{path}, line {number}"
        fields = line.rsplit(None, 1)
        if len(fields) != 2 or not NUMBER.fullmatch(fields[1]):
            raise ValueError(f"{where}: expected `/a/abbey 0`, found {line[:80]!r}")
        name = fields[0].strip().strip("/")
        if name in labels:
            raise ValueError(f"{where}: {name} is there twice")
        labels[name] = int(fields[1])
    names = {label: sys.intern(name) for name, label in labels.items()}
    if len(names) != len(labels):
        raise ValueError(f"{tree.location}/{path} gives one label to two classes: mend it")
    return names
