"""Walking source folders: what all layouts share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Left behind by file managers; never meant as images.
LITTER = {"Thumbs.db", "desktop.ini", "Icon\r"}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its class, and its split where the layout has one (None: to be assigned)."""

    key: str
    path: Path
    class_name: str
    split: str | None


def subfolders(folder: Path) -> list[Path]:
    """Visible folders directly below `folder`, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def files_below(folder: Path) -> list[Path]:
    """All visible files below `folder`, at any depth, sorted.

    Every one counts as found, whatever its extension: what is no image ends in the quarantine by name.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(parent) / name for name in names if not _is_hidden(name)]
    return sorted(found)


def files_in(folder: Path) -> list[Path]:
    """Visible files directly in `folder`, sorted."""
    return sorted(entry for entry in folder.iterdir() if entry.is_file() and not _is_hidden(entry.name))


def class_folders(
    root: Path, folder: Path, split: str | None, ignore: frozenset[str] = frozenset()
) -> tuple[list[SourceFile], set[str]]:
    """Files of `folder/<class>/**`, and the names of its class folders (empty ones too)."""
    files, class_names = [], set()
    for class_folder in subfolders(folder):
        if class_folder.name in ignore:
            continue
        class_name = readable(class_folder.name)
        class_names.add(class_name)
        files += [
            SourceFile(readable(path.relative_to(root).as_posix()), path, class_name, split)
            for path in files_below(class_folder)
        ]
    return files, class_names


def readable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become escapes, since manifests are JSON."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _raise(error: OSError) -> None:
    raise error  # a folder that cannot be read must not vanish in silence


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in LITTER or name == "__MACOSX"
