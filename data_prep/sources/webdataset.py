"""WebDataset: tars with an image and its label under one key. A folder of them, or a single one.

    train-00000.tar             000017.jpg (or .jpeg, .png, .webp) and 000017.cls (a number or a class name)
    val-00000.tar               or 000017.json with a "label"
    classes.txt                 optional: line n is the name of class n (also classnames.txt)

The split is in the shard's name or folder. Sets that this tool wrote take their names from manifest.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import islice

from data_prep.sources.blobs import RangeBlob
from data_prep.sources.listing import (
    Listing,
    Sample,
    holds_class_folders,
    names_of_labels,
    near_folders,
    read_lines,
    settle_splits,
    split_in_name,
)
from data_prep.sources.tar import scan_tar, tar_members
from data_prep.sources.threads import in_threads
from data_prep.sources.tree import SourceTree, TarTree, is_hidden, readable

NAME = "webdataset"
DESCRIPTION = "WebDataset tars: images with .cls or .json labels"
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
NAME_LISTS = ("classes.txt", "classnames.txt")
MAX_LABEL_BYTES = 1 << 20
NUM_PEEKED = 12  # members of the first shard
IMAGES_A_SHARD = 2_000  # for the progress bar


@dataclass(frozen=True)
class _Shard:
    path: str  # in the source
    location: str
    offset: int
    num_bytes: int
    version: str


@dataclass
class _Rows:
    """What a shard holds.

    Attributes:
        names, places: of the labelled images; offset and length of each.
        labels: as text.
    """

    shard: _Shard
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    num_unlabelled: int = 0
    num_without_image: int = 0

    def __len__(self) -> int:
        return len(self.names)


def detect(tree: SourceTree) -> bool:
    try:
        shards = _shards(tree)
        if not shards:
            return False
        first = tar_members(shards[0].location, shards[0].num_bytes, shards[0].offset)
        members = [_split_name(name) for name, _, _ in islice(first, NUM_PEEKED)]
    except ValueError:  # damaged, or in a zip: to be said by list_files, if this is no other layout
        return not holds_class_folders(tree)
    images = {key for key, ending in members if ending in IMAGE_ENDINGS}
    if isinstance(tree, TarTree) and images & {key for key, ending in members if ending == "cls"}:
        return True
    # Tars among class folders may repeat their images, and json files there may tell anything.
    return bool(images & {key for key, ending in members if ending in ("cls", "json")}) and (
        not holds_class_folders(tree)
    )


def _shards(tree: SourceTree) -> list[_Shard]:
    if isinstance(tree, TarTree):
        return [_Shard("", tree.location, 0, tree.num_bytes, tree.version)]
    paths = sorted(
        f"{folder}/{name}" if folder else name
        for folder in near_folders(tree)
        for name in tree.files_in(folder)
        if name.endswith(".tar")
    )
    return [_Shard(path, *tree.container(path)) for path in paths]


def list_files(tree: SourceTree) -> Listing:
    """All labelled images with class and split.

    Raises:
        ValueError: a tar is damaged, a label cannot be understood, or has no name in the list of classes.
    """
    shards = _shards(tree)
    if not shards:
        raise ValueError(f"{tree.location} holds no .tar files: name another --layout")
    found = list(in_threads(_list_shard, shards, "listing tars", IMAGES_A_SHARD))
    rows = [shard for shard in found if len(shard)]
    if not rows:
        raise ValueError(
            f"{tree.location}: no image in its tars has a label: each needs a .cls file, or a .json file "
            "with a label, under the same key"
        )
    splits = settle_splits(split_in_name(shard.shard.path) for shard in rows)
    warnings = _warnings(tree, found, splits)
    rows = [shard for shard in rows if split_in_name(shard.shard.path) in splits]
    texts = {text for shard in rows for text in shard.labels}
    names, display_names = _class_names(tree, texts)
    samples = []
    for shard in rows:
        split = splits[split_in_name(shard.shard.path)]
        prefix = f"{shard.shard.path}/" if shard.shard.path else ""
        for name, place, text in zip(shard.names, shard.places, shard.labels, strict=True):
            blob = RangeBlob(shard.shard.location, *place, shard.shard.version)
            samples.append(Sample(readable(prefix + name), blob, names[text], split))
    return Listing(samples, set(), display_names, warnings)


def _warnings(tree: SourceTree, found: list[_Rows], splits: dict[str | None, str | None]) -> list[str]:
    warnings = []
    num_unlabelled = sum(shard.num_unlabelled for shard in found)
    if num_unlabelled:
        warnings.append(f"{num_unlabelled:,} images of {tree.location} have no label and are left out")
    num_without_image = sum(shard.num_without_image for shard in found)
    if num_without_image:
        warnings.append(f"{num_without_image:,} labels of {tree.location} have no image")
    num_left_out = sum(len(shard) for shard in found if split_in_name(shard.shard.path) not in splits)
    if num_left_out:
        warnings.append(
            f"the test split ({num_left_out:,} images) is left out, since there is a validation split"
        )
    return warnings


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: as WebDataset does, at the first dot of the file's name."""
    folder, slash, leaf = name.rpartition("/")
    key, _, ending = leaf.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _list_shard(shard: _Shard) -> _Rows:
    where = f"{shard.location}" if not shard.path else f"{shard.path} in {shard.location}"
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, tuple[str, str]] = {}  # key → ending and text

    def is_label(name: str, length: int) -> bool:
        return _split_name(name)[1] in ("cls", "json") and length <= MAX_LABEL_BYTES

    for name, start, length, content in scan_tar(
        shard.location, shard.num_bytes, shard.offset, wanted=is_label
    ):
        if any(is_hidden(part) for part in name.split("/")):
            continue
        key, ending = _split_name(name)
        if ending in IMAGE_ENDINGS:
            if key in images:
                raise ValueError(
                    f"{where} has two images under the key {readable(key)} ({readable(images[key][0])} and "
                    f"{readable(name)}): pack it again with one image a key"
                )
            images[key] = (name, start, length)
        elif content is not None and (ending == "cls" or labels.get(key, ("", ""))[0] != "cls"):
            text = _label_in(content, ending, f"{where}: {readable(name)}")
            if text is not None:
                labels[key] = (ending, text)
    rows = _Rows(shard)
    for key, (name, start, length) in images.items():
        label = labels.pop(key, None)
        if label is None or label[1] == "-1":
            rows.num_unlabelled += 1
            continue
        rows.names.append(name)
        rows.places.append((start, length))
        rows.labels.append(label[1])
    rows.num_without_image = len(labels)
    return rows


def _label_in(content: bytes, ending: str, where: str) -> str | None:
    """The label of a .cls or .json member as text; None for a .json without one."""
    try:
        text = content.decode("utf-8").strip()
        if ending == "json":
            fields = json.loads(text)
            label = fields.get("label") if isinstance(fields, dict) else None
            if label is None:
                return None
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise ValueError("its label is neither a number nor a name")
            text = str(label).strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds no label ({error}): pack it again") from None
    if not text or len(text) > 200 or "\n" in text:
        raise ValueError(f"{where} holds no label: expected a number or a class name")
    return sys.intern(text)


def _class_names(tree: SourceTree, texts: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(label as text → class name, class name → display name)."""
    if not all(text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 10 for text in texts):
        return {text: text for text in texts}, {}
    numbers = {text: int(text) for text in texts}
    listed, shown, origin = _listed_names(tree)
    names = names_of_labels(numbers.values(), listed, origin)
    display_names = {names[label]: shown[label] for label in names if label < len(shown)}
    return {text: names[number] for text, number in numbers.items()}, display_names


def _listed_names(tree: SourceTree) -> tuple[list[str] | None, list[str], str]:
    """(class names in label order or None, their display names, the file that gives them)."""
    if tree.is_file("manifest.json"):
        try:
            manifest = json.loads(tree.read("manifest.json"))
        except (ValueError, RecursionError):
            manifest = None
        if isinstance(manifest, dict) and manifest.get("format") == "dali":
            names, shown = manifest.get("class_names"), manifest.get("display_names", [])
            if _are_texts(names) and _are_texts(shown):
                return names, shown, f"{tree.location}/manifest.json"
    for name in NAME_LISTS:
        if tree.is_file(name):
            return [line.strip() for line in read_lines(tree, name)], [], f"{tree.location}/{name}"
    return None, [], tree.location


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
