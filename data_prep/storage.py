"""Files on a disk: written so that a reader never sees a half-written one, and summed so that one can tell.

Example:
    >>> write_atomically(Path("manifest.json"), b"{}")
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

READ_BYTES = 1 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
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


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli), the checksum of a stored sample; 32 bits."""
    return int(google_crc32c.value(content))


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for one writer; a second one gets a RuntimeError at once.

    The lock is the kernel's, so it ends with its process however that dies.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"another process is writing to {folder}: wait for it to end, or choose another folder"
            ) from None
        yield
