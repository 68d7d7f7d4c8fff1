"""FFCV's `.beton` format, written from finished JPEG bytes and without FFCV.

The layout, as FFCV 1.0.2 reads it (little-endian):

    header            version, number of fields, page size, number of samples, place of the allocation table
    field descriptors one for `image` (RGBImageField, type 2), one for `label` (IntField, type 1)
    metadata          a row a sample: mode (0 = JPEG), width, height, place of the bytes; label
    pages             each `page_size` long and aligned to it; no sample crosses from one page into the next
    allocation table  a row an allocation: sample, place, size; runs to the end of the file

FFCV's own writer decodes and re-encodes every image, and needs torch, OpenCV and numba; this one appends
bytes. Header, metadata and table are written last, so a file whose header is zero was never finished.

Example:
    >>> with BetonWriter(Path("train.beton"), capacity=len(samples)) as writer:
    ...     for jpeg, width, height, label in samples:
    ...         offset = writer.add(jpeg, width, height, label)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

VERSION = 2
PAGE_BYTES = 8 << 20  # FFCV's default
JPEG_MODE = 0
FIELD_TYPES = ((2, b"image"), (1, b"label"))  # FFCV's type ids of RGBImageField and IntField

HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_DTYPE = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))],
    align=True,
)
IMAGE_DTYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA_DTYPE = np.dtype([("image", IMAGE_DTYPE), ("label", "<i8")], align=True)
ALLOCATION_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER_DTYPE.itemsize + len(FIELD_TYPES) * FIELD_DTYPE.itemsize


class BetonWriter:
    """Append JPEGs to a new `.beton`; `close()` finishes it.

    Args:
        path: file to write; replaced if it is there.
        capacity: the most samples that may come. Space for their metadata is kept at the front, so that
            the file can be written in one pass; fewer may come in the end.
        page_bytes: page size, a power of two from 2 MiB on; no stored image may be larger.
    """

    def __init__(self, path: Path, capacity: int, page_bytes: int = PAGE_BYTES) -> None:
        if page_bytes < (2 << 20) or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes is {page_bytes}: it must be a power of two from 2 MiB on")
        self.page_bytes = page_bytes
        self._capacity = capacity
        self._metadata = np.zeros(capacity, METADATA_DTYPE)
        self._allocations = np.zeros(capacity, ALLOCATION_DTYPE)
        self._num_samples = 0
        first_page = -(-(METADATA_START + self._metadata.nbytes) // page_bytes)
        self._position = first_page * page_bytes
        self._file = path.open("wb")
        self._file.seek(self._position)

    def add(self, jpeg: bytes, width: int, height: int, label: int) -> int:
        """Append one image; returns its byte offset in the file.

        Raises:
            ValueError: the image is larger than a page.
        """
        size = len(jpeg)
        if size > self.page_bytes:
            raise ValueError(
                f"stored image of {size:,} bytes is larger than a page of {self.page_bytes:,} bytes"
            )
        if self._num_samples == self._capacity:
            raise ValueError(f"more than the {self._capacity} samples that were announced")
        if self._position % self.page_bytes + size > self.page_bytes:
            self._position += self.page_bytes - self._position % self.page_bytes
            self._file.seek(self._position)
        self._file.write(jpeg)
        row = self._metadata[self._num_samples]
        row["image"] = (JPEG_MODE, width, height, self._position)
        row["label"] = label
        self._allocations[self._num_samples] = (self._num_samples, self._position, size)
        self._num_samples += 1
        offset = self._position
        self._position += size
        return offset

    def close(self) -> None:
        """Write table, metadata and header, and flush all to the disk."""
        table_start = -(-self._position // self.page_bytes) * self.page_bytes
        self._file.seek(table_start)
        self._file.write(self._allocations[: self._num_samples].tobytes())
        # The table has to be on the disk before the header says that it is.
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(HEADER_DTYPE.itemsize)
        self._file.write(_field_descriptors().tobytes())
        self._file.write(self._metadata[: self._num_samples].tobytes())
        self._file.seek(0)
        header = np.array(
            [(VERSION, len(FIELD_TYPES), self.page_bytes, self._num_samples, table_start)], HEADER_DTYPE
        )
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Close the file without finishing it: its header stays zero."""
        self._file.close()

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def _field_descriptors() -> np.ndarray:
    fields = np.zeros(len(FIELD_TYPES), FIELD_DTYPE)
    for row, (type_id, name) in zip(fields, FIELD_TYPES, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return fields


@dataclass(frozen=True)
class BetonTables:
    """What a `.beton` says of itself: metadata (METADATA_DTYPE) and allocations (ALLOCATION_DTYPE)."""

    page_bytes: int
    metadata: np.ndarray
    allocations: np.ndarray


def read_beton_tables(path: Path) -> BetonTables:
    """Read the tables of a `.beton` that this module wrote.

    Raises:
        ValueError: the file was never finished, is truncated, or is not of this kind.
    """
    size = path.stat().st_size
    if size < METADATA_START:
        raise ValueError(f"{path} is no finished .beton (only {size} bytes)")
    header = np.fromfile(path, HEADER_DTYPE, count=1)[0]
    num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if header["version"] != VERSION or header["num_fields"] != len(FIELD_TYPES):
        raise ValueError(f"{path} is no finished .beton of version {VERSION} with an image and a label")
    if table_start + num_samples * ALLOCATION_DTYPE.itemsize != size:
        raise ValueError(f"{path} is truncated, or something was appended to it")
    if METADATA_START + num_samples * METADATA_DTYPE.itemsize > table_start:
        raise ValueError(f"{path} has a damaged header")
    metadata = np.fromfile(path, METADATA_DTYPE, count=num_samples, offset=METADATA_START)
    allocations = np.fromfile(path, ALLOCATION_DTYPE, count=num_samples, offset=table_start)
    return BetonTables(int(header["page_size"]), metadata, allocations)
