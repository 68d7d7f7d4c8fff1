"""ILSVRC2012's development kit: what its class numbers mean, and the labels of the validation images.

    ILSVRC2012_devkit_t12/data/meta.mat                                  number → WordNet id and words
    ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt    line n: the number of image n

The numbers (1–1000) are not in the order of the WordNet ids.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
import zlib
from dataclasses import dataclass
from typing import Any

from data_prep.sources.matfile import read_structs
from data_prep.sources.tree import MAX_TEXT_BYTES, SourceTree
from data_prep.sources.wordnet import WORDNET_ID

ARCHIVE = re.compile(r"ILSVRC2012_devkit_t\d+\.(tar|tar\.gz|tgz)")
META = "meta.mat"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
MAX_TAR_BYTES = 256 << 20  # the real one unpacks to some 10 MB
REMEDY = "download ILSVRC2012_devkit_t12.tar.gz again"


@dataclass(frozen=True)
class Devkit:
    """The kit's contents.

    Attributes:
        val_classes: WordNet id of each validation image, in the order of their numbers.
        words: WordNet id → names, such as "tench, Tinca tinca".
    """

    val_classes: tuple[str, ...]
    words: dict[str, str]


def find_devkit(tree: SourceTree) -> str | None:
    """The kit's archive at the root of a source, or the folder that holds its two files."""
    archives = [name for name in tree.files_in() if ARCHIVE.fullmatch(name)]
    if archives:
        return archives[0]
    for folder in ("", *tree.subfolders()):
        for place in (folder, f"{folder}/data" if folder else "data"):
            if META in tree.files_in(place):
                return place
    return None


def read_devkit(tree: SourceTree, place: str) -> Devkit:
    """Read the kit that `find_devkit` found. ValueError: a file of it is missing or damaged."""
    where = f"{tree.location}/{place}"
    if ARCHIVE.fullmatch(place):
        files = _from_archive(tree, place)
    else:
        inside = set(tree.files_in(place))
        files = {
            name: tree.read(f"{place}/{name}" if place else name)
            for name in (META, GROUND_TRUTH)
            if name in inside
        }
    for name in (META, GROUND_TRUTH):
        if name not in files:
            raise ValueError(f"{where} has no {name}: {REMEDY}")
    classes, words = _read_meta(files[META], where)
    lines = files[GROUND_TRUTH].split()
    try:
        val_classes = tuple(classes[int(line)] for line in lines)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{where}: {GROUND_TRUTH} has a line that is no class number of {META} ({error}): {REMEDY}"
        ) from None
    return Devkit(val_classes, words)


def _from_archive(tree: SourceTree, path: str) -> dict[str, bytes]:
    found = {}
    try:
        with tree.open(path) as file, tarfile.open(fileobj=_unpacked(file)) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if name in (META, GROUND_TRUTH) else None
                if content is not None:
                    found[name] = content.read(MAX_TEXT_BYTES)
    # gzip's own error is an OSError without a number; those with one are the disk's.
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{tree.location}/{path} is damaged ({error}): {REMEDY}") from None
    return found


def _unpacked(file: Any) -> io.BytesIO:
    """The tar inside: in memory, so that neither it nor a header in it is larger than a kit can be."""
    packed = file.read(MAX_TEXT_BYTES + 1)
    with gzip.open(io.BytesIO(packed)) if packed[:2] == b"\x1f\x8b" else io.BytesIO(packed) as tar:
        content = tar.read(MAX_TAR_BYTES + 1)
    if max(len(packed) - MAX_TEXT_BYTES, len(content) - MAX_TAR_BYTES) > 0:
        raise tarfile.ReadError("it is larger than the kit")
    return io.BytesIO(content)


def _read_meta(content: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    """(class number → WordNet id, WordNet id → words) of the leaves of `meta.mat`."""
    classes, words = {}, {}
    try:
        for row in read_structs(content, "synsets"):
            # The inner nodes of the tree have numbers beyond 1,000.
            if row["num_children"] == 0:
                wordnet_id, number = str(row["WNID"]), row["ILSVRC2012_ID"]
                if not WORDNET_ID.fullmatch(wordnet_id) or not isinstance(number, int | float):
                    raise ValueError(f"{wordnet_id!r} and {number!r} are no class")
                classes[int(number)] = wordnet_id
                words[wordnet_id] = str(row["words"] or wordnet_id)
    # An OverflowError comes from a number that is infinite, a struct.error from a wrong length.
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise ValueError(f"{where}: {META} cannot be read ({error}): {REMEDY}") from None
    return classes, words
