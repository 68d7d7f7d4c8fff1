"""What a tree of processes uses, and what of a file is in memory: read from /proc, so Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

SAMPLING_SECONDS = 0.2
MADV_DONTNEED = 4
TICKS = os.sysconf("SC_CLK_TCK")


def process_tree(root: int) -> list[int]:
    """`root` and all that descend from it, as far as they live."""
    parents = {pid: int(stat[1]) for pid, stat in _all_stats()}
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def cpu_seconds(root: int) -> float:
    """User and system time of the tree so far, with the children that have ended and were waited for."""
    tree = set(process_tree(root))
    return sum(sum(map(int, stat[11:15])) for pid, stat in _all_stats() if pid in tree) / TICKS


def disk_bytes(root: int) -> int:
    """Bytes that the tree had fetched from the storage so far (not those found in the page cache)."""
    total = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


def _all_stats() -> Iterator[tuple[int, list[str]]]:
    """Of every process: its id, and the fields of /proc/<id>/stat from the state on."""
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                yield int(entry), Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()


class PeakMemory:
    """Samples the proportional set size (PSS) of a tree in a thread, and keeps the highest.

    Memory of its own (anonymous and shared memory) is told from mapped files: libraries, and those shards
    that are mapped, which the system may drop whenever it needs the room.
    """

    def __init__(self, root: int) -> None:
        self.own_mb = self.mapped_mb = 0.0
        self._root, self._done = root, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            own = mapped = 0
            for pid in process_tree(self._root):
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
                    own += kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"]
                    mapped += kilobytes["Pss_File:"]
            self.own_mb = max(self.own_mb, own * 1024 / 1e6)
            self.mapped_mb = max(self.mapped_mb, mapped * 1024 / 1e6)


def drop_from_memory(files: Iterable[Path]) -> float:
    """Drop files from the page cache; returns the share of their bytes that is in memory all the same.

    A page that a process has mapped stays. This process lets go of its own; those of worker processes
    cannot be reached from here, which the result then shows.
    """
    files = [path.resolve() for path in files]
    time.sleep(0.5)  # loaders that read ahead come to rest
    _unmap_pages({str(path) for path in files})
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # a page that is yet to be written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(map(_resident_bytes, files)) / sum(path.stat().st_size for path in files)


def _unmap_pages(names: set[str]) -> None:
    """Take the pages of these files out of this process's tables; the maps themselves stay valid."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        # Never of a map that can be written to: what was written there would be lost.
        if len(fields) == 6 and fields[5] in names and "w" not in fields[1]:
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _resident_bytes(path: Path) -> int:
    size = path.stat().st_size
    page = os.sysconf("SC_PAGE_SIZE")
    content = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-size // page), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(content.ctypes.data)
    if libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return min(size, int((pages & 1).sum()) * page)
