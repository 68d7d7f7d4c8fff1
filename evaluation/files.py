"""Files that a command leaves behind: whole or not at all."""

from __future__ import annotations

from pathlib import Path

from data_prep.storage import write_atomically


def write_file(path: Path, content: bytes) -> Path:
    """Write it, flushed and renamed; `path`."""
    write_atomically(path, content)
    return path


def utf8_bytes(text: str) -> bytes:
    """The text as a file holds it. A folder's name may hold bytes that are no text: they become "\\udcff"."""
    return text.encode("utf-8", errors="backslashreplace")
