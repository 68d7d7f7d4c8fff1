"""JSON that may come from anybody: every fault is a ValueError, and a file is read only so far.

Python's own reader ends in a RecursionError where brackets are nested a thousand times, and takes NaN and
Infinity, which JSON has not, for numbers.

Example:
    >>> read_json(Path("runs/demo/summary.json"))["final_top1"]
    0.913
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # of a status, a summary, a setting


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a file.

    Raises:
        ValueError: it is no JSON, or too large. OSError: it cannot be read.
    """
    return parse_json(read_bounded(path, max_bytes))


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A whole file. ValueError: it is larger than `max_bytes`. OSError: it cannot be read."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes >> 20} MiB, so it is not what its name says")
    return content


def parse_json(content: str | bytes) -> Any:
    """The value in a text. ValueError: it is no JSON."""
    try:
        return json.loads(content, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
