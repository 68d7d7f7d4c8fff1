"""Files of checkpoints: written with their SHA-256, and judged by it before anybody relies on them."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.storage import sha256_file, sync_folder
from train.checkpoint.manifest import CheckpointEntry

READ_WAITS = (0.5, 1.0)  # seconds, before a disk that did not read is asked again


class HashedFile:
    """What torch.save writes to: the SHA-256 comes with it, and the error of a write is kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def fault_of(path: Path, entry: CheckpointEntry) -> str | None:
    """What is wrong with a file that should hold `entry`.

    Raises:
        RuntimeError: it cannot be read now, which is no damage: nothing may be concluded from it.
    """
    for seconds in (*READ_WAITS, None):
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                return f"checkpoint {path} is truncated: {size:,} bytes instead of {entry.bytes:,}"
            if sha256_file(path) != entry.sha256:
                return f"checkpoint {path} is damaged: its SHA-256 is not the one it was saved with"
            return None
        except FileNotFoundError:
            return f"checkpoint {path} is missing"
        except OSError as error:
            if seconds is None:
                raise RuntimeError(
                    f"checkpoint {path} cannot be read ({error.strerror}): look at its disk, and run the "
                    "same command again"
                ) from None
            time.sleep(seconds)
    raise AssertionError("unreachable")


def is_whole(path: Path, entry: CheckpointEntry) -> bool:
    return fault_of(path, entry) is None


def zip_fault(path: Path) -> str | None:
    """What is wrong with the zip file that torch writes, by the checksums in it."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return f"{bad} in it does not fit its checksum" if bad else None


def replace_durably(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
