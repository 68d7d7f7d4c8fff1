"""Parquet files as the Hugging Face hub holds image data sets, such as imagenet-1k.

    data/train-00000-of-00294.parquet         columns image{bytes, path} and label
    data/validation-00000-of-00014.parquet
    data/test-00000-of-00028.parquet          label -1 for unknown: left out

Only labels and paths are read here. Where the images' paths tell WordNet ids (`n01440764_18.JPEG`), these
are the classes; else the names of the schema's ClassLabel; else the labels' numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep.sources.blobs import ParquetBlob, RangeReader
from data_prep.sources.listing import (
    Listing,
    Sample,
    holds_class_folders,
    names_of_labels,
    near_folders,
    settle_splits,
    split_in_name,
)
from data_prep.sources.threads import in_threads
from data_prep.sources.tree import SourceTree, readable
from data_prep.sources.wordnet import wordnet_id_in

NAME = "huggingface-parquet"
DESCRIPTION = "Hugging Face's parquet files with images and labels"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
BLOCK_BYTES = 64 << 10  # a column of labels is small, and what lies around it are images
ROWS_A_FILE = 4_000  # for the progress bar: of imagenet-1k


@dataclass(frozen=True)
class _Columns:
    """The columns of a file that matter, and what the schema says of the labels.

    Attributes:
        row_groups: number of rows of each.
    """

    image: str
    label: str
    has_path: bool
    class_names: tuple[str, ...] | None
    row_groups: tuple[int, ...]


@dataclass
class _Rows:
    """A file's rows: keys, blobs, labels, and the WordNet ids that paths tell ("" for none)."""

    path: str
    keys: list[str]
    blobs: list[ParquetBlob]
    labels: list[int]
    wordnet_ids: list[str]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.labels)


def detect(tree: SourceTree) -> bool:
    paths = _parquet_files(tree)
    if not paths:
        return False
    # A table beside class folders may tell anything of their images.
    return not holds_class_folders(tree)


def _parquet_files(tree: SourceTree) -> list[str]:
    return sorted(
        f"{folder}/{name}" if folder else name
        for folder in near_folders(tree)
        for name in tree.files_in(folder)
        if name.endswith(".parquet")
    )


def list_files(tree: SourceTree) -> Listing:
    """All labelled rows with class and split.

    Raises:
        ValueError: a file is no parquet, lacks a column, or has labels that its schema does not name.
    """
    paths = _parquet_files(tree)
    if not paths:
        raise ValueError(f"{tree.location} holds no .parquet files: name another --layout")
    files = list(in_threads(partial(_read_rows, tree), paths, "listing parquet files", ROWS_A_FILE))
    warnings = []
    labelled = [file for file in files if any(label >= 0 for label in file.labels)]
    num_unlabelled = sum(label < 0 for file in files for label in file.labels)
    if num_unlabelled:
        warnings.append(f"{num_unlabelled:,} images of {tree.location} have no label (-1) and are left out")
    splits = settle_splits(split_in_name(file.path) for file in labelled)
    left_out = [file for file in labelled if split_in_name(file.path) not in splits]
    if left_out:
        count = sum(len(file) for file in left_out)
        warnings.append(f"the test split ({count:,} images) is left out, since there is a validation split")
    used = [file for file in labelled if split_in_name(file.path) in splits]
    names, display_names = _class_names(tree, used)
    samples = [
        Sample(key, blob, names[label], splits[split_in_name(file.path)])
        for file in used
        for key, blob, label in zip(file.keys, file.blobs, file.labels, strict=True)
        if label >= 0
    ]
    return Listing(samples, set(), display_names, warnings)


def _read_rows(tree: SourceTree, path: str) -> _Rows:
    """A file's labels and paths; the images' bytes are not touched."""
    import pyarrow
    import pyarrow.parquet

    where = f"{tree.location}/{readable(path)}"
    location, offset, num_bytes, version = tree.container(path)
    try:
        file = pyarrow.parquet.ParquetFile(RangeReader(location, num_bytes, offset, BLOCK_BYTES))
        columns = _find_columns(file, where)
        wanted = [columns.label] + ([f"{columns.image}.path"] if columns.has_path else [])
        table = file.read(columns=wanted, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{where} is no parquet file, or damaged ({reason}): download it again") from None
    labels = [-1 if label is None else label for label in table[columns.label].to_pylist()]
    image_paths: list[str | None] = [None] * len(labels)
    if columns.has_path:
        image_paths = [image and image["path"] for image in table[columns.image].to_pylist()]
    known = [image_path for image_path in image_paths if image_path]
    if len(set(known)) == len(labels):
        keys = [f"{path}/{image_path}" for image_path in known]
    else:
        keys = [f"{path}/{row}" for row in range(len(labels))]
    column = sys.intern(f"{columns.image}.bytes")
    blobs = [
        ParquetBlob(location, num_bytes, group, row, column, version, offset)
        for group, num_rows in enumerate(columns.row_groups)
        for row in range(num_rows)
    ]
    wordnet_ids = [sys.intern(wordnet_id_in(image_path or "") or "") for image_path in image_paths]
    return _Rows(path, [readable(key) for key in keys], blobs, labels, wordnet_ids, columns.class_names)


def _find_columns(file: Any, where: str) -> _Columns:
    import pyarrow

    schema = file.schema_arrow
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300] or "none"
    if image is None or label is None:
        raise ValueError(
            f"{where} needs the columns image and label; it has {found}: rename them, or leave the file out"
        )
    kind = schema.field(image).type
    parts = {part.name: part.type for part in kind} if pyarrow.types.is_struct(kind) else {}
    binary = parts.get("bytes")
    if binary is None or not (pyarrow.types.is_binary(binary) or pyarrow.types.is_large_binary(binary)):
        raise ValueError(
            f"{where}: the column {image} must be a struct of bytes and path, as the datasets library "
            f"writes images; the columns are {found}"
        )
    if not pyarrow.types.is_integer(schema.field(label).type):
        raise ValueError(f"{where}: the column {label} must hold integers; the columns are {found}")
    groups = file.metadata
    return _Columns(
        image,
        label,
        pyarrow.types.is_string(parts.get("path", pyarrow.null())),
        _schema_names((schema.metadata or {}).get(b"huggingface"), label),
        tuple(groups.row_group(number).num_rows for number in range(groups.num_row_groups)),
    )


def _schema_names(metadata: bytes | None, column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel, from the JSON that the datasets library leaves in the schema."""
    try:
        names = json.loads(metadata or b"")["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None  # written by another tool
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _class_names(tree: SourceTree, files: list[_Rows]) -> tuple[dict[int, str], dict[str, str]]:
    """(label → class name, class name → display name)."""
    listed = {file.class_names for file in files if file.class_names is not None}
    if len(listed) > 1:
        raise ValueError(
            f"the parquet files in {tree.location} name their classes differently: take files of one data set"
        )
    labels = {label for file in files for label in file.labels if label >= 0}
    names = names_of_labels(labels, next(iter(listed), None), f"{tree.location} (its parquet schema)")
    pairs = {pair for file in files for pair in zip(file.labels, file.wordnet_ids, strict=True)}
    pairs = {(label, wordnet_id) for label, wordnet_id in pairs if label >= 0}
    ids = dict(pairs)
    if not (len(ids) == len(pairs) == len({name for _, name in pairs}) and all(ids.values())):
        return names, {}
    return ids, {ids[label]: names[label] for label in labels} if listed else {}
