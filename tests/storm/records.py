"""What the ranks wrote down of their steps: where each attempt began, how far it came, what it was given.

An attempt is a start of the ranks, by the launcher or by torchrun itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Key = tuple[int, int]  # number of the start, of the restart within it
TAIL_BYTES = 4096


@dataclass(frozen=True)
class Attempt:
    """One that came to a step; steps are counted from 0."""

    key: Key
    first: int
    last: int


class Records:
    """A folder of the files that observed_train writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._firsts: dict[Path, int] = {}

    def attempts(self) -> list[Attempt]:
        """Those with a step, in their order."""
        found: dict[Key, Attempt] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            key, steps = _key(path)[:2], self._ends(path)
            if steps is None:
                continue
            known = found.get(key, Attempt(key, *steps))
            found[key] = Attempt(key, min(known.first, steps[0]), max(known.last, steps[1]))
        return [found[key] for key in sorted(found)]

    def newest(self) -> Attempt | None:
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def _ends(self, path: Path) -> tuple[int, int] | None:
        with path.open("rb") as file:
            if path not in self._firsts:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return None
                self._firsts[path] = json.loads(line)["step"]
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0]
        return self._firsts[path], json.loads(whole.rpartition(b"\n")[2])["step"]

    def samples(self, rank: int) -> list[tuple[int, list[int]]]:
        """(step, ids) as one uninterrupted run: cut at each resume, then joined."""
        joined: list[tuple[int, list[int]]] = []
        for path in sorted(self.folder.glob(f"*-{rank}.jsonl")):
            rows = list(_rows(path))
            if rows:
                joined = [row for row in joined if row[0] < rows[0][0]] + rows
        return joined


def _key(path: Path) -> tuple[int, int, int]:
    start, restart, rank = path.stem.split("-")
    return int(start), int(restart), int(rank)


def _rows(path: Path) -> Iterator[tuple[int, list[int]]]:
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # killed in the middle of a line
            continue
        yield row["step"], row["ids"]
