"""Disk space and download progress, in words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.progress import progress_bar

ROOM_TO_SPARE = 1.02  # a disk is never used up to the last byte


def require_room(place: Path, needed_bytes: float) -> None:
    """Say how much disk is needed in the folder `place`.

    Raises:
        RuntimeError: there is less.
    """
    needed, free = needed_bytes * ROOM_TO_SPARE, shutil.disk_usage(place).free
    print(f"needs {readable_bytes(needed)} of disk in {place}, where {readable_bytes(free)} are free")
    if free < needed:
        raise RuntimeError(
            f"{place} has {readable_bytes(free)} free and {readable_bytes(needed)} are needed: free some "
            "space, or choose a folder on a larger disk"
        )


def readable_bytes(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def byte_bar(total: int | None, label: str, initial: int = 0) -> tqdm[Any]:
    """A progress bar in MB and MB/s; a context manager."""
    return progress_bar(total or 0, label, initial=initial, unit="B")
