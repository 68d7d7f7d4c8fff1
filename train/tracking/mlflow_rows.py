"""Rows of metrics.jsonl as MLflow's metrics: their names, which of them a server has, what comes next."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TRAIN_FIGURES = (
    "learning_rate",
    "images_per_second",
    "data_wait_fraction",
    "mfu",
    "grad_norm",
    "cost_usd",
    "epoch_cost_usd",
    "estimated_cost_usd",
)
RESULTS = ("loss", "top5", "top1")  # the last one that a row has marks it as sent
MAX_METRICS = 900  # of a request; MLflow takes 1000


@dataclass(frozen=True)
class Row:
    """A row as MLflow gets it.

    Attributes:
        metrics: name → value; the marker is the last.
    """

    step: int
    timestamp: int  # milliseconds
    metrics: dict[str, float]

    @property
    def marker(self) -> str:
        """The metric that tells whether a server has this row: no other row of this step has it."""
        return next(reversed(self.metrics))

    def as_metrics(self) -> list[Metric]:
        from mlflow.entities import Metric

        return [Metric(name, value, self.timestamp, self.step) for name, value in self.metrics.items()]


def as_row(row: Any) -> Row | None:
    """A line of metrics.jsonl; None for one that MLflow has no use for."""
    if not isinstance(row, dict) or not isinstance(row.get("split"), str):
        return None
    split, step, time = row["split"], row.get("step"), row.get("time")
    if not isinstance(step, int) or not isinstance(time, int | float):
        return None
    names = ("epoch", *TRAIN_FIGURES) if split == "train" else ("epoch",) if split == "val" else ()
    metrics = {name: float(row[name]) for name in names if isinstance(row.get(name), int | float)}
    results = [name for name in RESULTS if isinstance(row.get(name), int | float)]
    prefix = split.replace(":", "_")
    metrics |= {f"{prefix}_{name}": float(row[name]) for name in results}
    return Row(step, int(time * 1000), metrics) if results else None


class KnownRows:
    """Which rows a run of a server has, by the history of their markers; asked once for each marker."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._steps: dict[str, set[int]] = {}

    def has(self, row: Row) -> bool:
        if row.marker not in self._steps:
            history = self._client.get_metric_history(self._run_id, row.marker)
            self._steps[row.marker] = {metric.step for metric in history}
        return row.step in self._steps[row.marker]

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            self._steps[row.marker].add(row.step)


class RowFile:
    """Reads metrics.jsonl while it is being written; what was read and sent is left behind by `advance`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0
        self._next_offset = 0

    def rewind(self) -> None:
        self._offset = self._next_offset = 0

    def read(self, known: KnownRows) -> list[Row]:
        """The next rows that the server does not have, as many as fit into one request; empty at the end."""
        rows: list[Row] = []
        places: set[tuple[str, int]] = set()  # the same step may stand twice in a file, and goes out once
        num_metrics = 0
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:  # cut back by a new start
                self.rewind()
                self._inode = status.st_ino
            file.seek(self._offset)
            self._next_offset = self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is being written
                row = None
                with contextlib.suppress(ValueError):  # a line that a crash cut short
                    row = as_row(json.loads(line))
                if row is not None and (row.marker, row.step) not in places and not known.has(row):
                    if num_metrics + len(row.metrics) > MAX_METRICS:
                        break
                    rows.append(row)
                    places.add((row.marker, row.step))
                    num_metrics += len(row.metrics)
                self._next_offset += len(line)
        return rows

    def advance(self) -> None:
        """What `read` gave is sent."""
        self._offset = self._next_offset

    def first_time(self) -> float | None:
        """Of the first row, in unix seconds."""
        with contextlib.suppress(OSError, ValueError), self._path.open("rb") as file:
            row = as_row(json.loads(file.readline()))
            return None if row is None else row.timestamp / 1000
        return None
