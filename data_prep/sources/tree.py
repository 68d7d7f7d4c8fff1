"""What a layout looks at: the files of a folder, an S3 prefix, a zip or a tar archive, as one kind of tree.

Names are relative, with forward slashes; "" is the root. Hidden files and what file managers leave behind do
not exist here.
"""

from __future__ import annotations

import bisect
import io
import os
import re
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.blobs import Blob, FileBlob, RangeBlob, RangeReader, ZipBlob
from data_prep.sources.tar import member_name, tar_members
from data_prep.sources.walk import files_below, is_file, is_folder
from data_prep.storage import is_s3, open_folder, read_range, without_password

# Left behind by file managers; never meant as images.
LITTER = {"Thumbs.db", "desktop.ini", "Icon\r"}
MAX_TEXT_BYTES = 64 << 20  # of a list, a csv, a devkit


class SourceTree(ABC):
    """The visible files of a source."""

    location: str  # for messages

    @abstractmethod
    def subfolders(self, folder: str = "") -> list[str]:
        """Names (not paths) of the folders directly in `folder`, sorted; [] where there is no such folder."""

    @abstractmethod
    def files_in(self, folder: str = "") -> list[str]:
        """Names of the files directly in `folder`, sorted; [] where there is no such folder."""

    @abstractmethod
    def files_below(self, folder: str = "") -> list[str]:
        """Paths (from the root) of all files below `folder`, at any depth, sorted.

        Every one counts as found, whatever its extension: what is no image ends in the quarantine by name.
        """

    @abstractmethod
    def blob(self, path: str) -> Blob:
        """Where the bytes of a file are."""

    @abstractmethod
    def open(self, path: str) -> Any:
        """A seekable binary file, for containers inside the source (tar, parquet)."""

    @abstractmethod
    def container(self, path: str) -> tuple[str, int, int, str]:
        """(location, offset, length, version) of a file whose ranges can be read with `read_range`.

        ValueError: it is compressed inside an archive.
        """

    @abstractmethod
    def inside(self, folder: str) -> SourceTree:
        """The tree below a folder, with names relative to it."""

    def is_file(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.files_in(folder)

    def is_folder(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.subfolders(folder)

    def read(self, path: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """A small file (a list, a csv). ValueError: it is larger than `max_bytes`."""
        with self.open(path) as file:
            content = bytes(file.read(max_bytes + 1))
        if len(content) > max_bytes:
            raise ValueError(f"{self.location}/{path} is larger than {max_bytes >> 20} MiB: is it a list?")
        return content


def open_tree(location: str) -> SourceTree:
    """The tree at a path or `s3://` prefix; a zip or tar file is a tree of its own.

    Raises:
        ValueError: there is nothing, or a file that is no archive.
    """
    if is_s3(location):
        return _open_s3(location)
    path = Path(location)
    if not path.exists():
        if scheme := re.match(r"(?i)([a-z][a-z0-9+.-]+):/+", location):
            place = location[scheme.end() :] if scheme[1].lower() == "s3" else ""
            raise ValueError(
                f"source {without_password(location)} is no place that can be read: --source takes a path, "
                f"or an S3 prefix as s3://{place or 'bucket/prefix'}"
            )
        raise ValueError(f"source {location} does not exist: check --source")
    if path.is_dir():
        return LocalTree(path)
    if not path.is_file():
        raise ValueError(f"source {location} is no regular file or folder: check --source")
    status = path.stat()
    return open_archive(location, status.st_size, f"{status.st_size}|{status.st_mtime_ns}")


def open_archive(location: str, num_bytes: int, version: str) -> SourceTree:
    """The tree inside a zip or an uncompressed tar.

    Raises:
        ValueError: it is neither; the message says what to do.
    """
    magic = read_range(location, 0, 512)
    if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipTree(location, num_bytes, version)
    if magic[257:262] == b"ustar":
        return TarTree(location, num_bytes, version)
    if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic[:6] == b"\xfd7zXZ\x00":
        raise ValueError(
            f"source {location} is a compressed archive, which has no random access: unpack it (tar xf) and "
            "take the folder as --source"
        )
    if magic[:4] == b"PAR1":
        raise ValueError(f"source {location} is one parquet file: take its folder as --source")
    raise ValueError(f"source {location} is a file, but no zip or tar archive: --source takes a folder")


class LocalTree(SourceTree):
    """A folder on a disk, read as it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def subfolders(self, folder: str = "") -> list[str]:
        return [entry.name for entry in self._entries(folder) if is_folder(entry)]

    def files_in(self, folder: str = "") -> list[str]:
        return [entry.name for entry in self._entries(folder) if is_file(entry)]

    def is_file(self, path: str) -> bool:
        return (self.root / path).is_file()

    def is_folder(self, path: str) -> bool:
        return (self.root / path).is_dir()

    def files_below(self, folder: str = "") -> list[str]:
        return files_below(str(self.root), folder, is_hidden)

    def blob(self, path: str) -> Blob:
        return FileBlob(self.location, path)

    def open(self, path: str) -> Any:
        return (self.root / path).open("rb")

    def container(self, path: str) -> tuple[str, int, int, str]:
        status = (self.root / path).stat()
        return str(self.root / path), 0, status.st_size, f"{status.st_size}|{status.st_mtime_ns}"

    def inside(self, folder: str) -> SourceTree:
        return LocalTree(self.root / folder)


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of a listed tree: a range of `location` if `method` is None, else a zip member."""

    location: str
    offset: int
    length: int
    version: str
    method: int | None = None
    num_bytes: int = 0
    crc32: int = 0


class ListedTree(SourceTree):
    """A tree that is known from a list of its files: a bucket's, an archive's."""

    def __init__(self, location: str, members: dict[str, _Member]) -> None:
        self.location = location
        self._members = {
            name: member
            for name, member in members.items()
            if not any(is_hidden(part) for part in name.split("/"))
        }
        self._names = sorted(self._members)
        self._files: dict[str, list[str]] = {}
        self._folders: dict[str, list[str]] = {}
        for name in self._names:
            folder, _, leaf = name.rpartition("/")
            self._files.setdefault(folder, []).append(leaf)
        known = set()
        for folder in self._files:
            while folder and folder not in known:
                known.add(folder)
                parent, _, leaf = folder.rpartition("/")
                self._folders.setdefault(parent, []).append(leaf)
                folder = parent
        for leaves in self._folders.values():
            leaves.sort()

    def subfolders(self, folder: str = "") -> list[str]:
        return list(self._folders.get(folder, ()))

    def files_in(self, folder: str = "") -> list[str]:
        return list(self._files.get(folder, ()))

    def is_file(self, path: str) -> bool:
        return path in self._members

    def files_below(self, folder: str = "") -> list[str]:
        if not folder:
            return list(self._names)
        first = bisect.bisect_left(self._names, folder + "/")
        last = bisect.bisect_left(self._names, folder + "0")  # "0" follows "/"
        return self._names[first:last]

    def blob(self, path: str) -> Blob:
        m = self._members[path]
        if m.method is not None:
            return ZipBlob(m.location, m.offset, m.length, m.num_bytes, m.method, m.crc32, m.version)
        return RangeBlob(m.location, m.offset, m.length, m.version)

    def open(self, path: str) -> Any:
        member = self._members[path]
        if member.method is not None:
            return io.BytesIO(self.blob(path).read())
        return RangeReader(member.location, member.length, member.offset)

    def container(self, path: str) -> tuple[str, int, int, str]:
        member = self._members[path]
        if member.method is not None:
            raise ValueError(
                f"{self.location} holds {path} inside a zip, where it cannot be read in parts: unzip it, and "
                "take the folder as --source"
            )
        return member.location, member.offset, member.length, member.version

    def inside(self, folder: str) -> SourceTree:
        start = len(folder) + 1
        members = {path[start:]: self._members[path] for path in self.files_below(folder)}
        return ListedTree(f"{self.location.rstrip('/')}/{folder}", members)


class ZipTree(ListedTree):
    """The members of a zip archive; its directory is at its end, so nothing else is read."""

    def __init__(self, location: str, num_bytes: int, version: str) -> None:
        members = {}
        try:
            with zipfile.ZipFile(RangeReader(location, num_bytes, block_bytes=4 << 20)) as archive:
                for info in archive.infolist():
                    if info.is_dir():
                        continue
                    if info.flag_bits & 1:
                        raise ValueError(f"source {location} is encrypted: unzip it first")
                    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError(
                            f"source {location} is compressed in a rare way: unzip it, and take the folder "
                            "as --source"
                        )
                    members[member_name(info.filename)] = _Member(
                        location,
                        info.header_offset,
                        info.compress_size,
                        version,
                        info.compress_type,
                        info.file_size,
                        info.CRC,
                    )
        except zipfile.BadZipFile as error:
            raise ValueError(f"source {location} is a damaged zip ({error}): download it again") from None
        super().__init__(location, members)


class TarTree(ListedTree):
    """The members of an uncompressed tar."""

    def __init__(self, location: str, num_bytes: int, version: str) -> None:
        members = {
            name: _Member(location, offset, length, version)
            for name, offset, length in tar_members(location, num_bytes)
        }
        super().__init__(location, members)
        self.num_bytes, self.version = num_bytes, version


def _open_s3(location: str) -> SourceTree:
    folder = open_folder(location)
    files = folder.files()
    if files:
        members = {
            file.name: _Member(folder.path_of(file.name), 0, file.num_bytes, file.version) for file in files
        }
        return ListedTree(folder.location, members)
    parent, _, name = location.rstrip("/").rpartition("/")
    info = open_folder(parent).info(name) if parent != "s3:/" else None
    if info is None:
        raise ValueError(f"source {location} does not exist: there is nothing below that prefix")
    return open_archive(location, info.num_bytes, info.version)


def readable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become escapes, since manifests are JSON."""
    if name.isascii():
        return name  # the same object: there are millions of them
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in LITTER or name == "__MACOSX"
