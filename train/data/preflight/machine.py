"""What memory and disk of this machine can do for a data set.

Example:
    >>> usable_ram_bytes()
    24_700_000_000
    >>> read_cold(shards, index, num_threads=8, seconds=3).images_per_second
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNLIMITED = 1 << 60  # cgroup v1 writes a number like this where there is no limit
MAX_SYNCED_BYTES = (
    1 << 30
)  # of a shard; just written, it cannot leave the page cache before it is on the disk
MOSTLY_COLD = 0.8
FOLIO = 4 << 20  # bytes; Linux caches files in pieces of up to 2 MiB, and keeps what is dropped in part


@dataclass(frozen=True)
class ColdRead:
    """A measured read of samples that were not in the page cache.

    Attributes:
        num_images, num_bytes, seconds: what was read, and in what time.
        fault: why the figures say nothing about the disk, or None.
    """

    num_images: int
    num_bytes: int
    seconds: float
    fault: str | None = None

    @property
    def images_per_second(self) -> float:
        return self.num_images / max(self.seconds, 1e-9)

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / max(self.seconds, 1e-9)


def usable_ram_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process and the page cache can have: of the machine and of every cgroup around it.

    None where /proc does not say. What is in the page cache already counts as usable.
    """
    available = _field(proc / "meminfo", "MemAvailable:")
    if available is None:
        return None
    rooms = [available * 1024]
    for folder, is_v2 in _memory_cgroups(proc, cgroups):
        limit = _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        if limit is not None and limit < UNLIMITED:
            # The page cache counts against the limit, but gives way; what processes hold does not.
            held = [
                _field(folder / "memory.stat", name) for name in (["anon"] if is_v2 else ["total_rss", "rss"])
            ]
            rooms.append(max(0, limit - next((value for value in held if value is not None), 0)))
    return min(rooms)


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the memory controller, from this process's up to the root, and whether they are of v2."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:  # the last two: in a container, paths may be those outside
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        parts = [part for part in name.split("/") if part and part != ".."]
        for length in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:length]), not controllers


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """The number after `name` in a file of such lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    words = (line.split() for line in lines)
    return next((int(parts[1]) for parts in words if len(parts) > 1 and parts[0] == name), None)


def free_bytes(folder: Path) -> int:
    """Free disk space where `folder` is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def share_of_cores(
    cores: Sequence[int], count: int, topology: Path = Path("/sys/devices/system/cpu")
) -> set[int]:
    """`count` of the logical `cores`, whole physical ones first.

    Two threads of a core are slower than two cores: one rank alone on a machine must not be measured with
    the better half of all threads, as it will not have them with the other ranks at work.
    """

    def first_sibling(core: int) -> tuple[int, int]:
        try:
            siblings = (topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
            return int(siblings.replace("-", ",").split(",")[0]), core
        except (OSError, ValueError):
            return core, core

    return set(sorted(cores, key=first_sibling)[:count])


def read_cold(
    shards: Sequence[Path], index: np.ndarray, num_threads: int, seconds: float, num_samples: int = 600
) -> ColdRead:
    """Read samples chosen at random, after their pages were dropped from the page cache.

    Args:
        index: rows of INDEX_DTYPE. seconds: after which no more reads are begun.
    """
    chosen = np.random.default_rng(0).permutation(len(index))[:num_samples]
    ranges = [(int(row["shard"]), int(row["offset"]), int(row["length"])) for row in index[chosen]]
    if not ranges:
        return ColdRead(0, 0, 0.0, "there are no samples")
    with contextlib.ExitStack() as stack:
        files = []
        for path in shards:
            files.append(os.open(path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        _drop(files, ranges)
        resident = resident_fraction(files, ranges)
        read_before = _field(Path("/proc/self/io"), "read_bytes:")
        sizes, elapsed = _read(files, ranges, num_threads, seconds)
        read_after = _field(Path("/proc/self/io"), "read_bytes:")
    cold = 1 - resident
    if read_before is not None and read_after is not None:
        # mincore says "resident" of everything to those who may not write the file; this count does not.
        cold = max(cold, (read_after - read_before) / max(1, sum(sizes)))
    fault = None
    if cold < MOSTLY_COLD:
        fault = (
            f"{1 - cold:.0%} of the samples stayed in the page cache (a file system in memory, or another "
            "process that uses them)"
        )
    return ColdRead(len(sizes), sum(sizes), elapsed, fault)


def _drop(files: list[int], ranges: list[tuple[int, int, int]]) -> None:
    for shard in {shard for shard, _, _ in ranges}:
        if os.fstat(files[shard]).st_size <= MAX_SYNCED_BYTES:
            os.fsync(files[shard])
    windows = set()
    for shard, offset, length in ranges:
        windows |= {(shard, number) for number in range(offset // FOLIO, (offset + length - 1) // FOLIO + 1)}
    for shard, number in windows:
        with contextlib.suppress(OSError):
            os.posix_fadvise(files[shard], number * FOLIO, FOLIO, os.POSIX_FADV_DONTNEED)


def _read(
    files: list[int], ranges: list[tuple[int, int, int]], num_threads: int, seconds: float
) -> tuple[list[int], float]:
    """(bytes of every sample that was read, seconds)."""
    begin = time.perf_counter()

    def read(place: tuple[int, int, int]) -> int | None:
        if time.perf_counter() - begin > seconds:
            return None
        shard, offset, length = place
        return len(os.pread(files[shard], length, offset))

    with ThreadPoolExecutor(num_threads) as threads:
        sizes = [size for size in threads.map(read, ranges) if size is not None]
    return sizes, time.perf_counter() - begin


def resident_fraction(files: Sequence[int], ranges: Sequence[tuple[int, int, int]]) -> float:
    """Share of the pages of (file, offset, length) that are in the page cache, after mincore(2)."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    num_pages = num_resident = 0
    for shard in {shard for shard, _, _ in ranges}:
        with mmap.mmap(files[shard], 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as content:
            view = np.frombuffer(content, np.uint8)
            address = view.ctypes.data
            del view  # or the map could not be closed
            for _, offset, length in (place for place in ranges if place[0] == shard):
                begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
                pages = np.zeros(-(-(offset + length - begin) // mmap.PAGESIZE), np.uint8)
                place = ctypes.c_void_p(address + begin)
                if mincore(
                    place, ctypes.c_size_t(offset + length - begin), pages.ctypes.data_as(ctypes.c_void_p)
                ):
                    return 1.0
                num_pages += len(pages)
                num_resident += int((pages & 1).sum())
    return num_resident / max(1, num_pages)
