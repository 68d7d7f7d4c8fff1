"""What is made of the records that instances leave in the bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.storage import LocalFolder
from infra.layout import End, Keys, Node
from infra.records import progress_of, read_records


def rows(num_epochs: int, seconds: float = 60.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for epoch in range(1, num_epochs + 1):
        common = {"step": epoch * 10, "epoch": float(epoch), "time": 1000.0 + epoch * seconds}
        found.append({**common, "split": "train", "loss": 1.0, "images_per_second": 900.0})
        found.append({**common, "split": "val", "top1": 0.1 * epoch if epoch < 5 else 0.2})
    return found


def test_progress_says_where_it_is_and_how_long_it_takes() -> None:
    progress = progress_of(rows(5), num_epochs=16)
    assert progress is not None
    assert (progress.step, progress.epoch, progress.top1) == (50, 5.0, 0.2)
    assert progress.best_top1 == pytest.approx(0.4)
    assert progress.eta_seconds == pytest.approx(11 * 60)
    assert progress.images_per_second == 900


def test_an_interruption_does_not_stretch_the_estimate() -> None:
    interrupted = rows(6)
    for row in interrupted[8:]:
        row["time"] += 7200
    progress = progress_of(interrupted, 16)
    assert progress is not None and progress.eta_seconds == pytest.approx(600)


def test_before_the_first_row_there_is_no_progress() -> None:
    assert progress_of([], 16) is None
    assert progress_of([{"split": "train"}, {"step": "many"}], 16) is None
    first = progress_of(rows(1), 16)
    assert first is not None and first.eta_seconds is None


@pytest.fixture
def bucket(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "bucket")


def put(bucket: LocalFolder, key: str, content: Any) -> None:
    bucket.write(key, content if isinstance(content, bytes) else json.dumps(content).encode())


def test_one_damaged_record_hides_no_other(bucket: LocalFolder) -> None:
    keys = Keys("mine")
    put(bucket, keys.node("i-1"), Node(instance="i-1", phase="training", updated=2.0).to_json())
    put(bucket, keys.node("i-2"), b"{")
    put(bucket, keys.node("i-3"), {"instance": "../../x", "phase": "training"})
    put(bucket, keys.node("i-4"), b" " * (300 << 10))
    put(bucket, keys.end, End(status="stopped", reason="the budget is spent", time=3.0).to_json())
    records = read_records(bucket, "mine")
    assert [node.instance for node in records.nodes] == ["i-1"]
    assert records.end is not None and records.end.status == "stopped"
    assert records.job is None and records.best is None


def test_the_copy_that_is_further_counts(bucket: LocalFolder) -> None:
    keys = Keys("mine")
    lines = [json.dumps(row) + "\n" for row in rows(4)]
    put(bucket, keys.run + "files/metrics.jsonl-a", "".join(lines[:4]).encode())
    item = {"step": 20, "sha256": "a" * 64, "bytes": 7}
    checkpoints = [{**item, "name": "step-10.pt"}, {**item, "name": "step-20.pt"}]
    files = [{"name": "metrics.jsonl", "key": "files/metrics.jsonl-a"}]
    latest = {"checkpoints": checkpoints, "best": "step-10.pt", "files": files}
    put(bucket, keys.run + "latest.json", latest)
    records = read_records(bucket, "mine", 16)
    assert records.progress is not None and records.progress.epoch == 2
    assert records.best is not None and records.best.name == "step-10.pt"
    assert records.newest is not None and records.newest.name == "step-20.pt"
    put(bucket, keys.report + "metrics.jsonl", "".join([*lines, '{"step": ']).encode())
    records = read_records(bucket, "mine", 16)
    assert records.progress is not None and records.progress.epoch == 4
