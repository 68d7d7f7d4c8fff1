"""FFCV's `.beton` format, written from finished JPEG bytes and without FFCV.

The layout, as FFCV 1.0.2 reads it (little-endian):

    header            version, number of fields, page size, number of samples, place of the allocation table
    field descriptors one for `image` (RGBImageField, type 2), one for `label` (IntField, type 1)
    metadata          a row a sample: mode (0 = JPEG), width, height, place of the bytes; label
    pages             each `page_size` long and aligned to it; no sample crosses from one page into the next
    allocation table  a row an allocation: sample, place, size; runs to the end of the file

FFCV's own writer decodes and re-encodes every image, and needs torch, OpenCV and numba; this one places
bytes. `BetonLayout` says where each image goes, as a pure function of the sizes so far, so that writing can
stop and go on anywhere. Header, descriptors and metadata come last: a file whose header is zero was never
finished.

Example:
    >>> layout = BetonLayout(capacity=len(samples))
    >>> offset = layout.place(len(jpeg))
    >>> head, table_start, table = layout.tables(index)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.storage import Folder

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


class BetonLayout:
    """Where images lie in a `.beton`.

    Args:
        capacity: the most samples that may come. Space for their metadata is kept at the front, so that the
            file can be written in one pass; fewer may come in the end.
        align_bytes: images begin at a multiple of it, and of a page.
        page_bytes: page size, a power of two from 2 MiB on; no stored image may be larger.
    """

    def __init__(self, capacity: int, align_bytes: int = PAGE_BYTES, page_bytes: int = PAGE_BYTES) -> None:
        if page_bytes < (2 << 20) or page_bytes & (page_bytes - 1) or align_bytes % page_bytes:
            raise ValueError(f"page_bytes is {page_bytes}: it must be a power of two from 2 MiB on")
        self.capacity, self.page_bytes = capacity, page_bytes
        head_bytes = METADATA_START + capacity * METADATA_DTYPE.itemsize
        self.data_start = -(-head_bytes // align_bytes) * align_bytes
        self.position = self.data_start

    def place(self, size: int) -> int:
        """The byte offset of the next image, of `size` bytes. ValueError: it is larger than a page."""
        if size > self.page_bytes:
            raise ValueError(
                f"stored image of {size:,} bytes is larger than a page of {self.page_bytes:,} bytes"
            )
        if self.position % self.page_bytes + size > self.page_bytes:
            self.position += self.page_bytes - self.position % self.page_bytes
        offset = self.position
        self.position += size
        return offset

    def tables(self, index: np.ndarray) -> tuple[bytes, int, bytes]:
        """(all bytes before `data_start`, place of the allocation table, its bytes) for an index.

        Args:
            index: rows with the fields offset, length, label, width and height (INDEX_DTYPE).
        """
        metadata = np.zeros(len(index), METADATA_DTYPE)
        metadata["image"]["mode"] = JPEG_MODE
        metadata["image"]["width"], metadata["image"]["height"] = index["width"], index["height"]
        metadata["image"]["data_ptr"] = index["offset"]
        metadata["label"] = index["label"]
        allocations = np.zeros(len(index), ALLOCATION_DTYPE)
        allocations["sample_id"] = np.arange(len(index))
        allocations["ptr"], allocations["size"] = index["offset"], index["length"]
        table_start = -(-self.position // self.page_bytes) * self.page_bytes
        header = np.array(
            [(VERSION, len(FIELD_TYPES), self.page_bytes, len(index), table_start)], HEADER_DTYPE
        )
        head = header.tobytes() + _field_descriptors().tobytes() + metadata.tobytes()
        return head + bytes(self.data_start - len(head)), table_start, allocations.tobytes()


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


def read_beton_tables(folder: Folder, name: str) -> BetonTables:
    """Read the tables of a `.beton` that this project wrote, from a disk or S3.

    Raises:
        ValueError: the file was never finished, is truncated, or is not of this kind.
    """
    path = folder.path_of(name)
    info = folder.info(name)
    size = info.num_bytes if info else 0
    if size < METADATA_START:
        raise ValueError(f"{path} is no finished .beton (only {size} bytes)")
    header = np.frombuffer(folder.read(name, 0, HEADER_DTYPE.itemsize), HEADER_DTYPE)[0]
    num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if header["version"] != VERSION or header["num_fields"] != len(FIELD_TYPES):
        raise ValueError(f"{path} is no finished .beton of version {VERSION} with an image and a label")
    if table_start + num_samples * ALLOCATION_DTYPE.itemsize != size:
        raise ValueError(f"{path} is truncated, or something was appended to it")
    if METADATA_START + num_samples * METADATA_DTYPE.itemsize > table_start:
        raise ValueError(f"{path} has a damaged header")

    def table(dtype: np.dtype, start: int) -> np.ndarray:
        return np.frombuffer(folder.read(name, start, num_samples * dtype.itemsize), dtype)

    return BetonTables(
        int(header["page_size"]), table(METADATA_DTYPE, METADATA_START), table(ALLOCATION_DTYPE, table_start)
    )
