"""`metrics.jsonl`: a row a line, flushed at once; cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_prep.plain_json import parse_json, read_bounded
from data_prep.storage import write_atomically

MAX_METRICS_BYTES = 1 << 30  # some five million rows


class MetricsFile:
    """Appends rows; fields without a value are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: dict[str, Any]) -> None:
        """Write one row.

        Numbers are rounded to six significant digits, `time` to milliseconds; a non-finite one is left out,
        since JSON has none.
        """
        kept = {
            key: round(value, 3) if key == "time" else _rounded(value)
            for key, value in row.items()
            if _has_value(value)
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop rows later than `step`: the resumed run writes them again."""
        if not self._path.exists():
            return
        rows = [row for row in read_metrics(self._path) if row.get("step", 0) <= step]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())


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


def _has_value(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
