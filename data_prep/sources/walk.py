"""The files below a folder of a disk, through links to folders too, each folder once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable


def files_below(root: str, folder: str, is_hidden: Callable[[str], bool]) -> list[str]:
    """Paths (relative to `root`) of all visible files below `folder`, at any depth, sorted.

    Links to folders are followed, unless they lead to a folder that holds them (a loop) or to one that was
    walked already. What is no folder counts as a file, so that a link to nowhere is found to be bad.

    Raises:
        OSError: a folder cannot be read; it must not vanish in silence.
    """
    found: list[str] = []
    walked: set[tuple[int, int]] = set()
    # Links wait until all real folders are walked: a folder that can be reached both ways keeps its own name.
    waiting, links = deque([folder]), deque[str]()
    while waiting or links:
        inside = waiting.popleft() if waiting else links.popleft()
        path = os.path.join(root, inside) if inside else root  # noqa: PTH118
        status = os.stat(path)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in walked:
            continue
        walked.add((status.st_dev, status.st_ino))
        prefix = inside + "/" if inside else ""
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    continue
                if not is_folder(entry):
                    found.append(prefix + entry.name)
                elif not entry.is_symlink():
                    waiting.append(prefix + entry.name)
                elif not _leads_up(path, entry.path):
                    links.append(prefix + entry.name)
    return sorted(found)


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # as above
        return False


def _leads_up(folder: str, link: str) -> bool:
    """Whether a link in `folder` leads to it or to a folder above: all would be found again, for ever."""
    here, target = os.path.realpath(folder), os.path.realpath(link)
    return os.path.commonpath([here, target]) == target
