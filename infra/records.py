"""What the bucket says of a deployment: job, instances, events, end, the run's newest rows and checkpoints.

All of it is written by the instances and read here with a bound on its size; what cannot be read counts as
not there, so one damaged record hides nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_prep.storage import Folder
from infra.layout import MAX_RECORD_BYTES, End, Event, Job, Keys, Node, Record, read_record

MAX_LATEST_BYTES = 4 << 20
MAX_METRICS_BYTES = 64 << 20
LATEST_NAME = "latest.json"  # of the run's mirror: docs/never_lose_a_run.md
ALIVE = ("booting", "installing", "staging", "waiting", "preparing", "training", "evaluating")

RecordType = TypeVar("RecordType", bound=Record)


@dataclass(frozen=True)
class Progress:
    """Where the training is, from the newest rows of metrics.jsonl.

    Attributes:
        epoch: done so far; num_epochs: None where the recipe is not known.
        seconds_per_epoch: of the last few epochs that ran without an interruption; None before the second.
    """

    step: int
    epoch: float
    num_epochs: int | None
    top1: float | None
    best_top1: float | None
    images_per_second: float | None
    seconds_per_epoch: float | None
    time: float  # of the newest row, epoch seconds

    @property
    def eta_seconds(self) -> float | None:
        if self.num_epochs is None or self.seconds_per_epoch is None:
            return None
        return max(0.0, self.num_epochs - self.epoch) * self.seconds_per_epoch


@dataclass
class Checkpoint:
    """One that the mirror names."""

    name: str
    step: int
    num_bytes: int
    sha256: str


@dataclass
class Records:
    """All that was found of a deployment at one moment."""

    job: Job | None = None
    end: End | None = None
    nodes: list[Node] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    progress: Progress | None = None
    newest: Checkpoint | None = None
    best: Checkpoint | None = None


def read_records(folder: Folder, deployment: str, num_epochs: int | None = None) -> Records:
    """Look at a deployment in the bucket `folder`.

    Raises:
        RuntimeError: S3 cannot be read.
    """
    keys = Keys(deployment)
    records = Records(job=_read(folder, keys.job, Job), end=_read(folder, keys.end, End))
    records.nodes = _read_all(folder, keys.nodes, Node, lambda node: node.updated)
    records.events = _read_all(folder, keys.history, Event, lambda event: event.time)
    latest = _read_json(folder, keys.run + LATEST_NAME, MAX_LATEST_BYTES)
    if latest is not None:
        checkpoints = [c for item in latest.get("checkpoints") or () if (c := _checkpoint(item))]
        records.newest = checkpoints[-1] if checkpoints else None
        records.best = next((c for c in checkpoints if c.name == latest.get("best")), records.newest)
    rows = _newest_rows(folder, keys, latest)
    records.progress = progress_of(rows, num_epochs)
    return records


def progress_of(rows: list[dict[str, Any]], num_epochs: int | None) -> Progress | None:
    """None before the first row."""
    rows = [row for row in rows if _number(row.get("step")) is not None]
    if not rows:
        return None
    last = rows[-1]
    validated = [row for row in rows if row.get("split") == "val" and _number(row.get("top1")) is not None]
    speeds = [row["images_per_second"] for row in rows if _number(row.get("images_per_second")) is not None]
    times = [time for row in rows if (time := _number(row.get("time"))) is not None]
    epochs = [epoch for row in rows if (epoch := _number(row.get("epoch"))) is not None]
    return Progress(
        step=int(last["step"]),
        epoch=max(epochs, default=0.0),
        num_epochs=num_epochs,
        top1=validated[-1]["top1"] if validated else None,
        best_top1=max((row["top1"] for row in validated), default=None),
        images_per_second=speeds[-1] if speeds else None,
        seconds_per_epoch=_seconds_per_epoch(validated),
        time=max(times, default=0.0),
    )


def _seconds_per_epoch(validated: list[dict[str, Any]]) -> float | None:
    """The median of the last gaps between validations: an interruption makes one of them long."""
    gaps = []
    for before, after in itertools.pairwise(validated):
        epochs = (_number(after.get("epoch")) or 0.0) - (_number(before.get("epoch")) or 0.0)
        seconds = (_number(after.get("time")) or 0.0) - (_number(before.get("time")) or 0.0)
        if epochs > 0 and seconds > 0:
            gaps.append(seconds / epochs)
    gaps = sorted(gaps[-5:])
    return gaps[len(gaps) // 2] if gaps else None


def _newest_rows(folder: Folder, keys: Keys, latest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of the copy that the agent uploads, or the mirror's; whichever is further."""
    names = [keys.report + "metrics.jsonl"]
    for item in (latest or {}).get("files") or ():
        if (
            isinstance(item, dict)
            and item.get("name") == "metrics.jsonl"
            and isinstance(item.get("key"), str)
        ):
            names.append(keys.run + item["key"])
    found: list[list[dict[str, Any]]] = [[]]
    for name in names:
        info = folder.info(name)
        if info is None or info.num_bytes > MAX_METRICS_BYTES:
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append(parse_rows(folder.read(name)))
    return max(found, key=lambda rows: _number(rows[-1].get("step")) or 0.0 if rows else -1.0)


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _read(folder: Folder, key: str, model: type[RecordType]) -> RecordType | None:
    info = folder.info(key)
    if info is None or info.num_bytes > MAX_RECORD_BYTES:
        return None
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_record(model, folder.read(key))
    return None


def _read_all(
    folder: Folder, prefix: str, model: type[RecordType], order: Callable[[RecordType], float]
) -> list[RecordType]:
    found = (_read(folder, file.name, model) for file in folder.files(prefix))
    return sorted((record for record in found if record is not None), key=order)


def _read_json(folder: Folder, key: str, most_bytes: int) -> dict[str, Any] | None:
    info = folder.info(key)
    if info is None or info.num_bytes > most_bytes:
        return None
    with contextlib.suppress(FileNotFoundError, ValueError):
        value = json.loads(folder.read(key))
        return value if isinstance(value, dict) else None
    return None


def _checkpoint(item: Any) -> Checkpoint | None:
    try:
        return Checkpoint(str(item["name"]), int(item["step"]), int(item["bytes"]), str(item["sha256"]))
    except (KeyError, TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
