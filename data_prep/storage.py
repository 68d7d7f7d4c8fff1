"""Files on a disk or in S3 behind one `Folder`: list, read ranges, write atomically, lock, write in pieces.

A location is a path or `s3://bucket/prefix`. Whatever is written appears whole or not at all; errors of the
network are retried with backoff, and what remains is a `RuntimeError` sentence. boto3 is needed for
`s3://` only.

Example:
    >>> folder = open_folder("s3://my-bucket/imagenet")
    >>> folder.write("manifest.json", b"{}")
    >>> folder.read("train.beton", offset=0, length=24)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import google_crc32c

READ_BYTES = 1 << 20
STREAM_BYTES = 16 << 20  # of one range, where a file is read from front to back
STREAM_THREADS = 4  # ranges in flight then; S3 gives 5 Gbit/s a connection
LOCK_POLL_SECONDS = 0.2
DISK_FULL_WAITS = (1.0, 2.0, 4.0)  # seconds; somebody may be freeing space

Result = TypeVar("Result")


class FolderInUse(RuntimeError):
    """Another process holds the lock of a folder on a disk."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file below a folder: its name with forward slashes, its size, and what changes when it changes."""

    name: str
    num_bytes: int
    version: str  # size and time of a file, ETag of an object


class PiecewiseFile(ABC):
    """A new file written in numbered pieces, in any order, all `piece_bytes` long but the last.

    It gets its name in `finish()`; before, nobody sees it under that name.
    """

    token: str  # identifies the unfinished file, so that a later process can go on with it

    @abstractmethod
    def put(self, number: int, content: bytes | bytearray | memoryview) -> None:
        """Write piece `number`; on return it is durable."""

    @abstractmethod
    def read_piece(self, number: int, num_bytes: int) -> bytes | None:
        """A piece as it was written, None where it cannot be read before the end (S3)."""

    @abstractmethod
    def durable_pieces(self) -> set[int]:
        """Numbers of the pieces that an earlier process left (a disk cannot tell, and names all)."""

    @abstractmethod
    def finish(self, num_pieces: int, num_bytes: int) -> None:
        """All pieces are there: give the file its name."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it, finished or not; what is durable stays for a later process."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written of it."""


class Folder(ABC):
    """A folder on a disk, or the objects below an S3 prefix. Names are relative, with forward slashes."""

    location: str

    @abstractmethod
    def files(self, below: str = "") -> list[FileInfo]:
        """All files below `below` (a folder name, at any depth), sorted by name."""

    @abstractmethod
    def children(self) -> list[FileInfo]:
        """The files directly in the folder, sorted by name."""

    @abstractmethod
    def info(self, name: str) -> FileInfo | None:
        """Size and version of a file, None where there is none."""

    @abstractmethod
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` on, or all; fewer at the end of the file. FileNotFoundError."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically and durably."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; no error where there is none."""

    @abstractmethod
    def create(self, name: str, piece_bytes: int, token: str | None = None) -> PiecewiseFile:
        """A new file to be written in pieces, or (with its `token`) one that another process began."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Hold the folder for one writer. RuntimeError at once where another one holds it.

        The value is a function that raises RuntimeError if the lock was lost meanwhile.
        """

    def unfinished(self, name: str = "") -> list[tuple[str, str]]:
        """(name, token) of files that were begun and that no listing shows; on a disk there are none."""
        return []

    def abort_unfinished(self, name: str, keep: str | None = None) -> None:  # noqa: B027 (a disk has none)
        """Remove what `unfinished` tells of `name`, but for one token: S3 charges for it."""

    def path_of(self, name: str) -> str:
        """The location of a file, for `read_range` and for messages."""
        return f"{self.location.rstrip('/')}/{name}"


class LocalFolder(Folder):
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)

    def files(self, below: str = "") -> list[FileInfo]:
        found = []
        start = self.path / below if below else self.path
        for parent, _, names in os.walk(start):
            for name in names:
                path = Path(parent) / name
                with contextlib.suppress(FileNotFoundError):
                    found.append(_file_info(path.relative_to(self.path).as_posix(), path))
        return sorted(found, key=lambda file: file.name)

    def children(self) -> list[FileInfo]:
        if not self.path.is_dir():
            return []
        found = [_file_info(entry.name, entry) for entry in self.path.iterdir() if entry.is_file()]
        return sorted(found, key=lambda file: file.name)

    def info(self, name: str) -> FileInfo | None:
        path = self.path / name
        return _file_info(name, path) if path.is_file() else None

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return read_range(str(self.path / name), offset, length)

    def write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        retry_disk_full(lambda: write_atomically(path, content))

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def create(self, name: str, piece_bytes: int, token: str | None = None) -> PiecewiseFile:
        self.path.mkdir(parents=True, exist_ok=True)
        return _LocalPieces(self.path / name, piece_bytes)

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            yield lambda: None


class _LocalPieces(PiecewiseFile):
    def __init__(self, path: Path, piece_bytes: int) -> None:
        self.token = "disk"
        self._path, self._piece_bytes = path, piece_bytes
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RuntimeError(
                f"another process is still writing {path}: end it, or wait for it, and run the command again"
            ) from None
        except OSError:
            pass  # a file system without locks

    def put(self, number: int, content: bytes | bytearray | memoryview) -> None:
        def write() -> None:
            view, position = memoryview(content), number * self._piece_bytes
            while view:
                written = os.pwrite(self._file, view, position)
                view, position = view[written:], position + written
            os.fdatasync(self._file)

        retry_disk_full(write)

    def read_piece(self, number: int, num_bytes: int) -> bytes | None:
        return _pread(self._file, number * self._piece_bytes, num_bytes)

    def durable_pieces(self) -> set[int]:
        return set(range(-(-os.fstat(self._file).st_size // self._piece_bytes)))

    def finish(self, num_pieces: int, num_bytes: int) -> None:
        os.ftruncate(self._file, num_bytes)
        os.fsync(self._file)
        self.close()
        self._partial.replace(self._path)
        sync_folder(self._path.parent)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def abort(self) -> None:
        self.close()
        self._partial.unlink(missing_ok=True)


def open_folder(location: str | Path) -> Folder:
    """The folder at a path or at `s3://bucket/prefix`. Nothing is made or asked yet.

    Raises:
        ValueError: another scheme than s3, or no bucket in it.
        RuntimeError: boto3 is missing.
    """
    text = str(location)
    if is_s3(text):
        return _s3().S3Folder(text)
    # One slash too few would be a folder called "s3:".
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|[sS]3:", text):
        raise ValueError(f"{without_password(text)} is no path, and no s3://bucket/prefix: check it")
    return LocalFolder(Path(text))


def without_password(location: str) -> str:
    """A location for a message: `scheme://user:password@place` without what stands before the @."""
    return re.sub(r"//[^/]*@", "//…@", location)


def is_s3(location: str) -> bool:
    return location.startswith("s3://")


def read_range(location: str, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of the file at a path or `s3://bucket/key`; fewer than `length` at its end.

    Raises:
        FileNotFoundError: there is no such file.
        OSError, RuntimeError: it cannot be read (S3: after several attempts).
    """
    if is_s3(location):
        return _s3().read_object(location, offset, length)
    # Nonblocking: opening a pipe that nobody writes to would wait for ever.
    file = os.open(location, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return _pread(file, offset, os.fstat(file).st_size - offset if length is None else length)
    finally:
        os.close(file)


def stream(folder: Folder, name: str, num_bytes: int, block_bytes: int = STREAM_BYTES) -> Iterator[bytes]:
    """A file from front to back in blocks, the next ones being fetched meanwhile.

    Memory: STREAM_THREADS + 1 blocks.
    """
    offsets = range(0, num_bytes, block_bytes)
    with ThreadPoolExecutor(STREAM_THREADS, thread_name_prefix="stream") as pool:
        pending: deque[Future[bytes]] = deque()
        try:
            for offset in offsets:
                pending.append(pool.submit(folder.read, name, offset, min(block_bytes, num_bytes - offset)))
                if len(pending) > STREAM_THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def sha256_of(
    folder: Folder, name: str, num_bytes: int, advance: Callable[[int], object] | None = None
) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; `advance` is told the bytes of each block."""
    digest = hashlib.sha256()
    for block in stream(folder, name, num_bytes):
        digest.update(block)
        if advance is not None:
            advance(len(block))
    return digest.hexdigest()


def retry_disk_full(action: Callable[[], Result]) -> Result:
    """Do it; on a full disk wait and try again, then stop with a sentence.

    Raises:
        RuntimeError: the disk stayed full.
    """
    for seconds in (*DISK_FULL_WAITS, None):
        try:
            return action()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if seconds is None:
                raise RuntimeError(
                    "the disk is full: free some space and run the same command again (nothing is lost)"
                ) from None
            print(f"the disk is full; trying again in {seconds:.0f} s", file=sys.stderr)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, then rename it to `path`.

    Where that fails, `path` is what it was, and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut (a rename is only durable once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def crc32c(content: bytes | bytearray | memoryview) -> int:
    """CRC-32C (Castagnoli), the checksum of a stored sample; 32 bits."""
    return int(google_crc32c.value(bytes(content) if isinstance(content, memoryview) else content))


@contextlib.contextmanager
def exclusive_lock(folder: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold `folder` for one writer; a second one waits so long, and then gets FolderInUse (a RuntimeError).

    The lock is the kernel's, so it ends with its process however that dies.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        # Opened anew each time: whoever held it may have removed the folder, and with it the file.
        with (folder / ".lock").open("a") as file:
            if _is_locked(file, folder):
                yield
                return
        if time.monotonic() >= deadline:
            raise FolderInUse(
                f"another process is writing to {folder}: wait for it to end, or choose another folder"
            )
        time.sleep(LOCK_POLL_SECONDS)


def _is_locked(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks; to refuse them for ever would be worse.
        print(
            f"warning: {folder} cannot be locked ({error.strerror}): start one writer only", file=sys.stderr
        )
    return True


def _s3():
    try:
        from data_prep import s3
    except ImportError:
        raise RuntimeError("s3:// needs boto3: pip install boto3") from None
    return s3


def _file_info(name: str, path: Path) -> FileInfo:
    status = path.stat()
    return FileInfo(name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _pread(file: int, offset: int, length: int) -> bytes:
    pieces = []
    while length > 0 and (piece := os.pread(file, min(length, 1 << 30), offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
