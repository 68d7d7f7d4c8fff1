"""What a prepared data set holds: `manifest.json` and one sample index a split.

    data/intel/
      manifest.json      written last: no manifest, no data set
      train.beton        the shards in FFCV's format, one a split; or
    train-00000.tar    in WebDataset's, 128–512 MB each, with train-00000.idx for DALI
      train.index.npy    one row a sample, see INDEX_DTYPE; random access for every loader
      train.keys.txt     line n: the source key of sample n, as JSON
      quarantine.jsonl   one line a source file that could not be used

Example:
    >>> manifest = load_manifest(Path("data/intel"))
    >>> index = load_index(Path("data/intel"), manifest, "train")
    >>> index["label"][:3]
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data_prep.storage import Folder, LocalFolder, open_folder, sha256_file

MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20  # of a million classes, or shards
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
SPLITS = ("train", "val")

# One row a sample, in sample-id order. Little-endian and packed, so a file can be mapped on any machine.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the JPEG in its shard, bytes
        ("length", "<u4"),  # bytes
        ("crc32c", "<u4"),  # of these bytes
        ("label", "<i4"),
        ("shard", "<u2"),  # ordinal in the split's list of shards
        ("width", "<u2"),  # pixels
        ("height", "<u2"),
    ]
)


def _plain_file_name(name: str) -> str:
    # A manifest may come from anybody: a name must not lead out of its folder.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"file name {name!r} is not a plain name")
    return name


FileName = Annotated[str, AfterValidator(_plain_file_name)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Model):
    """A file of the data set, with its size and SHA-256."""

    name: FileName
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))


def entry_of(name: str, content: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class SplitEntry(_Model):
    """One split: its counts and files.

    Attributes:
        shards: the files with the images, in the order of the index's `shard` column.
        dali_indexes: DALI's `.idx` of each shard, in the same order; () for other formats.
    """

    num_samples: int = Field(ge=0)
    class_counts: tuple[int, ...]
    shards: tuple[FileEntry, ...]
    dali_indexes: tuple[FileEntry, ...] = ()
    index: FileEntry
    keys: FileEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of the split."""
        return (*self.shards, *self.dali_indexes, self.index, self.keys)


class ImageSettings(_Model):
    """How every stored image was made.

    Attributes:
        encode: "q90": every image decoded, capped and encoded once, at `quality`. "lossless": a baseline
            JPEG of three components within the cap keeps its bytes; the others as with "q90".
        resolution_cap: pixels of `cap_side`, never enlarged to; None for no limit.
        apply_exif: images are turned as their EXIF orientation says, instead of kept as stored.
        subsampling: of the chroma, "420" or "444" (for images of few pixels).
    """

    encode: Literal["q90", "lossless"] = "q90"
    resolution_cap: int | None = Field(default=500, ge=8, le=65535)
    cap_side: Literal["longest", "shortest"] = "longest"
    quality: int = Field(default=90, ge=1, le=100)
    subsampling: Literal["420", "444"] = "420"
    apply_exif: bool = False
    restart_markers: bool = False


class Manifest(_Model):
    """The contents of `manifest.json`."""

    version: Literal[1] = 1
    format: Literal["ffcv", "dali"] = "ffcv"
    layout: str
    class_names: tuple[str, ...]  # sorted; a label is an ordinal in them
    display_names: tuple[str, ...] = ()  # what people call the classes; () in old data sets
    splits: dict[Literal["train", "val"], SplitEntry]
    mean: tuple[float, float, float]  # of the training images, in units of [0, 1]
    std: tuple[float, float, float]
    images: ImageSettings
    num_found: int
    num_quarantined: int
    quarantine: FileEntry | None = None  # quarantine.jsonl; None in old data sets
    quarantined_by_reason: dict[str, int]
    source_fingerprint: str
    tool_version: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def files(self) -> list[FileEntry]:
        """All files of the data set but the manifest itself."""
        files = [file for split in self.splits.values() for file in split.files]
        return files + ([self.quarantine] if self.quarantine else [])

    @property
    def num_bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards)


def load_manifest(location: Path | str | Folder) -> Manifest:
    """Read the manifest of a data set in a folder or at `s3://bucket/prefix`.

    Raises:
        ValueError: the folder or its manifest is missing, or the manifest cannot be understood.
    """
    folder = location if isinstance(location, Folder) else open_folder(location)
    path = folder.path_of(MANIFEST_NAME)
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise ValueError(
            f"data folder {folder.location} does not exist: prepare it with python -m data_prep prepare"
        )
    try:
        # Of a bucket as a whole: a range of an object has no checksum.
        bound = MAX_MANIFEST_BYTES + 1 if isinstance(folder, LocalFolder) else None
        content = folder.read(MANIFEST_NAME, length=bound)
    except FileNotFoundError:
        raise ValueError(
            f"{folder.location} holds no manifest.json, so it is no finished data set: "
            "run python -m data_prep prepare (again, if it was interrupted)"
        ) from None
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: it is no manifest of a data set"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path} is damaged or of another version ({where}: {first['msg']})") from None


def save_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest; this is what makes a folder a data set."""
    folder.write(MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())


def read_index(folder: Folder, manifest: Manifest, split: Literal["train", "val"]) -> np.ndarray:
    """The sample index of a split, read into memory from a folder or S3: array of INDEX_DTYPE.

    Raises:
        ValueError: as `load_index`.
    """
    if isinstance(folder, LocalFolder):
        return load_index(folder.path, manifest, split)
    entry = _split_entry(folder.location, manifest, split)
    content = _read_whole(folder, entry.index)
    index = np.load(io.BytesIO(content), allow_pickle=False)
    if index.dtype != INDEX_DTYPE or index.shape != (entry.num_samples,):
        raise ValueError(f"{folder.path_of(entry.index.name)} does not fit its manifest: prepare it again")
    _check_rows(index, manifest, entry, folder.path_of(entry.index.name))
    return index


def read_keys(folder: Folder, manifest: Manifest, split: Literal["train", "val"]) -> list[str]:
    """Source keys of a split in sample-id order, from a folder or S3. ValueError: damaged."""
    content = _read_whole(folder, _split_entry(folder.location, manifest, split).keys)
    return [json.loads(line) for line in content.decode().splitlines()]


def _read_whole(folder: Folder, entry: FileEntry) -> bytes:
    try:
        content = folder.read(entry.name)
    except FileNotFoundError:
        raise ValueError(f"{folder.path_of(entry.name)} is missing: copy it again") from None
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ValueError(f"{folder.path_of(entry.name)} is damaged (its SHA-256 differs): copy it again")
    return content


def _split_entry(location: str, manifest: Manifest, split: str) -> SplitEntry:
    if split not in manifest.splits:
        raise ValueError(f"{location} has no split {split!r}: it holds {', '.join(manifest.splits)}")
    return manifest.splits[split]


def load_index(folder: Path, manifest: Manifest, split: Literal["train", "val"]) -> np.ndarray:
    """Map the sample index of a split: array of INDEX_DTYPE, shape (num_samples,), read-only.

    Raises:
        ValueError: the split is not there, or its index is not what the manifest says.
    """
    entry = _split_entry(str(folder), manifest, split)
    path = folder / entry.index.name
    check_size(path, entry.index)
    # Labels, places and sizes come from here, so a wrong byte would train on garbage in silence.
    if sha256_file(path) != entry.index.sha256:
        raise ValueError(
            f"{path} is damaged (its SHA-256 differs): copy it again, or prepare the data set again"
        )
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no sample index ({error}): prepare the data set again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (entry.num_samples,):
        raise ValueError(f"{path} does not fit its manifest: prepare the data set again")
    _check_rows(index, manifest, entry, str(path))
    return index


def _check_rows(index: np.ndarray, manifest: Manifest, entry: SplitEntry, path: str) -> None:
    """That no row leads out of its shard or names no class: who made the manifest made its checksums, too."""
    if not len(index):
        return
    shard_bytes = np.array([shard.bytes for shard in entry.shards], dtype=np.float64)
    labels, shards = index["label"], index["shard"]
    fits = labels.min() >= 0 and labels.max() < manifest.num_classes and shards.max() < len(shard_bytes)
    # As floats, which cannot overflow; they are exact up to 9 PB.
    if not fits or (index["offset"].astype(np.float64) + index["length"] > shard_bytes[shards]).any():
        raise ValueError(
            f"{path} names classes or places that the data set does not have: prepare the data set again"
        )


def load_keys(folder: Path, manifest: Manifest, split: Literal["train", "val"]) -> list[str]:
    """Source keys of a split in sample-id order."""
    text = (folder / manifest.splits[split].keys.name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def check_size(path: Path, entry: FileEntry) -> None:
    """Raise ValueError where a file is missing or not as long as the manifest says (cheap, no reading)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it again, or prepare the data set again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(
            f"{path} has {size:,} bytes, its manifest says {entry.bytes:,}: it was truncated or replaced; "
            "copy it again, or prepare the data set again"
        )
