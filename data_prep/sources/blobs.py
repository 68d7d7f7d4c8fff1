"""Where the bytes of one sample are: small picklable records that a worker process reads.

A blob has `read()` (its bytes; OSError or ValueError where they cannot be had), `version()` (a short text
that changes with the content; for the fingerprint of a source) and `unit` (what is read as a whole with it,
such as a row group of a parquet file; None where a sample can be read alone).
"""

from __future__ import annotations

import io
import stat
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.storage import is_s3, read_range

MAX_BLOB_BYTES = 256 << 20  # no image that a classifier needs; a bound for the memory


class TooLarge(ValueError):
    """A file beyond MAX_BLOB_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"file larger than {MAX_BLOB_BYTES >> 20} MiB")


class Blob(Protocol):
    """See the module."""

    def read(self) -> bytes: ...

    def version(self) -> str: ...

    @property
    def unit(self) -> tuple[Any, ...] | None: ...


class _Alone:
    __slots__ = ()

    @property
    def unit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class FileBlob(_Alone):
    """A whole file of a disk: `root/name` (two texts, since a million samples share the root)."""

    root: str
    name: str

    @property
    def path(self) -> Path:
        return Path(self.root, self.name)

    def read(self) -> bytes:
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BLOB_BYTES:
            raise TooLarge
        return self.path.read_bytes()

    def version(self) -> str:
        try:
            status = self.path.stat()
        except OSError:
            return "unreadable"  # a link to nowhere: it will be quarantined
        return f"{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class RangeBlob(_Alone):
    """A range of a file or object: a member of a tar, an object of a bucket (from 0 to its size)."""

    location: str
    offset: int
    length: int
    container_version: str

    def read(self) -> bytes:
        if self.length > MAX_BLOB_BYTES:
            raise TooLarge
        content = read_range(self.location, self.offset, self.length)
        if len(content) != self.length:
            raise ValueError("its archive ends before it")
        return content

    def version(self) -> str:
        return f"{self.container_version}|{self.offset}|{self.length}"


@dataclass(frozen=True, slots=True)
class ZipBlob(_Alone):
    """A member of a zip archive, stored or deflated; its CRC-32 is checked."""

    location: str
    header_offset: int
    compressed_bytes: int
    num_bytes: int
    method: int  # zipfile.ZIP_STORED or ZIP_DEFLATED
    crc32: int
    container_version: str

    def read(self) -> bytes:
        if max(self.num_bytes, self.compressed_bytes) > MAX_BLOB_BYTES:
            raise TooLarge
        # One read for header and data in all but strange cases: the extra field is rarely as long as this.
        guess = 30 + 1024 + self.compressed_bytes
        content = read_range(self.location, self.header_offset, guess)
        if content[:4] != b"PK\x03\x04" or len(content) < 30:
            raise ValueError("damaged zip member")
        start = 30 + sum(struct.unpack("<HH", content[26:30]))
        data = content[start : start + self.compressed_bytes]
        if len(data) < self.compressed_bytes:
            data = read_range(self.location, self.header_offset + start, self.compressed_bytes)
        if self.method == 8:
            try:
                # Never inflate more than was announced: a zip bomb.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.num_bytes + 1)
            except zlib.error:
                raise ValueError("damaged zip member") from None
        if len(data) != self.num_bytes or zlib.crc32(data) != self.crc32:
            raise ValueError("damaged zip member")
        return data

    def version(self) -> str:
        return f"{self.container_version}|{self.header_offset}|{self.crc32}"


@dataclass(frozen=True, slots=True)
class MissingBlob(_Alone):
    """A file that a list names and that is not there: it shall end in the quarantine, not vanish."""

    def read(self) -> bytes:
        raise ValueError("listed, but not there")

    def version(self) -> str:
        return "missing"


@dataclass(frozen=True, slots=True)
class BytesBlob(_Alone):
    """A small image that is held in memory, since its file has no range of bytes for it."""

    content: bytes

    def read(self) -> bytes:
        return self.content

    def version(self) -> str:
        return f"{len(self.content)}|{zlib.crc32(self.content)}"


@dataclass(frozen=True, slots=True)
class PixelsBlob(_Alone):
    """Raw planar pixels (3, height, width), as CIFAR's files hold them; read as a PPM image."""

    location: str
    offset: int
    height: int
    width: int
    container_version: str

    def read(self) -> bytes:
        size = 3 * self.height * self.width
        planes = read_range(self.location, self.offset, size)
        if len(planes) != size:
            raise ValueError("its file ends before it")
        return ppm_of_planes(planes, self.height, self.width)

    def version(self) -> str:
        return f"{self.container_version}|{self.offset}"


def ppm_of_planes(planes: bytes, height: int, width: int) -> bytes:
    """A PPM file of planar pixels: `planes` holds (3, height, width) uint8."""
    size = 3 * height * width
    pixels = bytearray(size)
    for channel in range(3):
        pixels[channel::3] = planes[channel * size // 3 : (channel + 1) * size // 3]
    return b"P6 %d %d 255\n" % (width, height) + bytes(pixels)


@dataclass(frozen=True, slots=True)
class ParquetBlob:
    """One value of a binary column (`column` as in `image.bytes`), row `row` of a row group."""

    location: str
    num_bytes: int  # of the parquet file
    row_group: int
    row: int
    column: str
    container_version: str
    offset: int = 0  # of the parquet file, where it lies inside a tar

    @property
    def unit(self) -> tuple[str, int, int]:
        return (self.location, self.offset, self.row_group)

    def read(self) -> bytes:
        group = self._group()
        if self.row >= len(group):
            raise ValueError("its parquet file has fewer rows than when it was listed")
        value = group[self.row].as_py()
        if value is None:
            raise ValueError("the image column is empty")
        if len(value) > MAX_BLOB_BYTES:
            raise TooLarge
        return bytes(value)

    def _group(self) -> Any:
        """The row group's column; each thread keeps the last one, since a task's samples share it."""
        place = (self.location, self.offset, self.num_bytes, self.row_group, self.column)
        if getattr(_LAST_GROUP, "place", None) != (*place, self.container_version):
            _LAST_GROUP.place = None
            _LAST_GROUP.group = _row_group(*place)
            _LAST_GROUP.place = (*place, self.container_version)
        return _LAST_GROUP.group

    def version(self) -> str:
        return f"{self.container_version}|{self.row_group}|{self.row}"


_LAST_GROUP = threading.local()


def _row_group(location: str, offset: int, num_bytes: int, row_group: int, column: str) -> Any:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(RangeReader(location, num_bytes, offset))
        value = file.read_row_group(row_group, columns=[column]).column(0)
        # Not combined into one array, which more than 2 GiB of images would not fit.
        return pyarrow.compute.struct_field(value, column.split(".")[1:]) if "." in column else value
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the format
        raise ValueError("damaged parquet file") from None


class RangeReader(io.RawIOBase):
    """A seekable view of a file or object, or of `length` bytes of it: for tarfile, zipfile and pyarrow.

    Small reads are served from one block that is fetched at a time. Wants a read-only user, one thread.
    """

    def __init__(self, location: str, length: int, offset: int = 0, block_bytes: int | None = None) -> None:
        self._location, self._length, self._start = location, length, offset
        # A request to S3 costs as much as 4 MiB of transfer; a disk's page cache reads ahead by itself.
        self._block_bytes = block_bytes or (4 << 20 if is_s3(location) else 64 << 10)
        self._position = 0
        self._block_start, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        inside = self._position - self._block_start
        if inside < 0 or inside + size > len(self._block):
            fetch = min(max(size, self._block_bytes), left)
            self._block_start = self._position
            self._block = read_range(self._location, self._start + self._position, fetch)
            inside = 0
        piece = self._block[inside : inside + size]
        self._position += len(piece)
        if len(self._block) > 4 * self._block_bytes:
            self._block = b""  # one large read is not worth keeping
        return piece

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
