"""`metrics.jsonl`: a row a line, flushed at once; cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.plain_json import parse_json, read_bounded
from data_prep.storage import write_atomically

MAX_METRICS_BYTES = 1 << 30  # some five million rows


class MetricsFile:
    """Appends rows; fields without a value are left out.

    A disk that takes no row costs a warning: the rows wait in memory, and are written with the next one.

    Attributes:
        num_rows: rows of the run so far; a checkpoint remembers it.
    """

    def __init__(self, path: Path, say: Callable[[str], Any] = print) -> None:
        self._path, self._say = path, say
        self._waiting: list[str] = []
        self._is_failing = False
        self.num_rows = 0

    def append(self, row: dict[str, Any]) -> None:
        """Write one row, as `clean_row` leaves it."""
        self._waiting.append(json.dumps(clean_row(row)) + "\n")
        self.num_rows += 1
        try:
            self._write()
        except OSError as error:
            if not self._is_failing:
                self._say(f"warning: {self._path} takes no rows ({error.strerror}); they are kept in memory")
            self._is_failing = True
        else:
            if self._is_failing:
                self._say(f"{self._path} takes rows again, none is lost")
            self._is_failing = False

    def _write(self) -> None:
        content = "".join(self._waiting).encode()
        if not content:
            return
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(file).st_size
            if os.write(file, content) < len(content):
                os.ftruncate(file, before)  # a disk that became full in the middle of it
                raise OSError(28, "No space left on device")
            self._waiting = []
        finally:
            os.close(file)

    def sync(self) -> None:
        """Make all rows durable: no checkpoint may be, whose rows are not.

        Raises:
            OSError: the disk does not take them.
        """
        if self._waiting:  # the training thread tries again with the next row
            raise OSError(28, "No space left on device")
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def cut_to(self, num_rows: int) -> None:
        """Keep the first rows only: the resumed run writes the others again.

        Lines are counted, whatever is in them: one that is damaged must not let another one in twice.
        """
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        kept = lines[:num_rows]
        damaged = sum(not _is_row(line) for line in kept) + num_rows - len(kept)
        if damaged:
            self._say(f"warning: {damaged} of {num_rows} rows of {self._path} are damaged or missing")
        if lines:
            write_atomically(self._path, b"".join(line + b"\n" for line in kept))
        self.num_rows = len(kept)


def clean_row(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row is kept, by all that show it.

    Numbers are rounded to six significant digits, `time` to milliseconds; a non-finite one is left out,
    since JSON has none.
    """
    return {
        key: round(value, 3) if key == "time" else _rounded(value)
        for key, value in row.items()
        if _has_value(value)
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a last line that a crash cut short is passed over.

    Raises:
        ValueError: the file is larger than any training writes. OSError: it cannot be read.
    """
    rows = []
    for line in read_bounded(path, MAX_METRICS_BYTES).splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _has_value(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
