"""One large file, piece by piece: an interrupted download goes on, and nothing counts before its checksum.

What has arrived lies in `.NAME.<start of its SHA-256>.partial` beside the file: of other
content it is another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.storage import sha256_file, sync_folder

PIECE_BYTES = 8 << 20


def is_whole(path: Path, num_bytes: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes and sha256_file(path) == sha256


def bring_file(
    read: Callable[[int, int], bytes],
    path: Path,
    num_bytes: int,
    sha256: str | None,
    bar: Any,
) -> None:
    """Bring a file to `path`, where it appears whole or not at all.

    Args:
        read: (offset, length) → bytes of the source.
        sha256: None where nobody has told it.
        bar: of progress, in bytes.

    Raises:
        ValueError: twice, other bytes came than the checksum tells of.
        OSError, RuntimeError: of the disk, or of `read`; what has arrived stays for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if sha256 is not None and is_whole(path, num_bytes, sha256):
        bar.update(num_bytes)
        return
    partial = path.with_name(f".{path.name}.{(sha256 or 'unchecked')[:12]}.partial")
    if sha256 is None:
        partial.unlink(missing_ok=True)  # nobody could tell whether the rest fits
    for _ in range(2):  # what lay there from before may be damaged
        digest = _bring(read, partial, num_bytes, bar)
        if sha256 is None or digest == sha256:
            partial.replace(path)
            sync_folder(path.parent)
            return
        partial.unlink()
        bar.update(-num_bytes)
    raise ValueError(
        f"{path.name} is damaged where it comes from: its SHA-256 is not the one it was saved with"
    )


def _bring(read: Callable[[int, int], bytes], partial: Path, num_bytes: int, bar: Any) -> str:
    digest = hashlib.sha256()
    with partial.open("a+b") as file:
        file.seek(0)
        offset = 0
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            offset += len(piece)
        if offset > num_bytes:
            file.truncate(0)
            digest, offset = hashlib.sha256(), 0
        bar.update(offset)
        while offset < num_bytes:
            piece = read(offset, min(PIECE_BYTES, num_bytes - offset))
            if not piece:
                raise RuntimeError(f"{partial.name} ends early where it comes from: the file was replaced")
            file.write(piece)
            file.flush()
            digest.update(piece)
            offset += len(piece)
            bar.update(len(piece))
        os.fsync(file.fileno())
    return digest.hexdigest()
