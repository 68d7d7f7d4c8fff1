"""SIGKILL at every point of a save: what was told to be there is there, and the best one stays the best."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.integration.die_saving import STEPS, TOP1
from train.checkpoint import CheckpointStore, load_checkpoint
from train.tracking.metrics_file import read_metrics

Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a child in a folder, to die at a point; its answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.die_saving"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def begin(folder: Path, point: int | None = None) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"folder": str(folder), "point": point}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert not any("error" in line for line in answer["answers"]), answer
        return answer

    yield begin
    process.stdin.close()
    process.wait()


def rows_of_calm_run() -> list[tuple[int, str]]:
    return [(step, split) for step in range(1, STEPS + 1) for split in ("train", "val")]


def check_after_kill(folder: Path, told: dict[str, Any] | None) -> None:
    """What the next start finds: nothing older than what was told to be there."""
    store = CheckpointStore(folder / "checkpoints")
    said: list[str] = []
    latest = store.latest(said.append)
    assert not said or "made anew" in said[0], said  # no kill leaves a damaged file
    if told is None:
        return
    assert latest is not None and latest.step >= told["saved"]
    manifest = store.manifest()
    best = load_checkpoint(store.folder / str(manifest.best))
    assert best["best_top1"] >= told["best"]
    published = load_checkpoint(store.folder / "best.pt")  # perhaps still the former one, but whole
    assert published["best_top1"] >= told["best"]
    assert float(load_file(store.folder / "best.safetensors")["weight"][0, 0]) <= STEPS


def run_with_kills(folder: Path, start: Start, points: Iterator[int]) -> int:
    """Start again and again, each dying at the next point, until one comes to the end; the kills."""
    folder.mkdir()
    told: dict[str, Any] | None = None
    kills = 0
    while True:
        answer = start(folder, next(points, None))
        resumed = answer["answers"][0] if answer["answers"] else None
        if resumed is not None and "from" in resumed:
            assert told is None or resumed["from"] >= told["saved"]
            assert resumed["rows"] >= 2 * resumed["from"]
        saved = [line for line in answer["answers"] if "saved" in line]
        told = saved[-1] if saved else told
        if not answer["killed"]:
            break
        kills += 1
        check_after_kill(folder, told)
    rows = [(row["step"], row["split"]) for row in read_metrics(folder / "metrics.jsonl")]
    assert rows == rows_of_calm_run()  # none twice, none missing
    store = CheckpointStore(folder / "checkpoints")
    best = load_checkpoint(folder / "checkpoints")
    assert best["best_top1"] == max(TOP1) and best["step"] == TOP1.index(max(TOP1)) + 1
    assert len(list(store.folder.glob("step-*.pt"))) == len(store.manifest().checkpoints) <= 3
    assert not list(store.folder.glob(".*.partial"))
    return kills


def test_kill_at_random_points_of_saves(tmp_path: Path, start: Start) -> None:
    (tmp_path / "calm").mkdir()
    num_points = start(tmp_path / "calm")["answers"][-1]["points"]
    assert num_points > 300
    chooser = random.Random(2026)
    kills = 0
    for number in range(4):
        # Early ones keep a start from getting anywhere; so the later a start, the later it may die.
        points = (chooser.randrange(30 + 12 * turn) for turn in range(14))
        kills += run_with_kills(tmp_path / str(number), start, points)
    assert kills >= 20


@pytest.mark.long
def test_kill_at_every_point_of_a_save(tmp_path: Path, start: Start) -> None:
    (tmp_path / "calm").mkdir()
    num_points = start(tmp_path / "calm")["answers"][-1]["points"]
    for point in range(num_points):
        folder = tmp_path / f"point{point}"
        assert run_with_kills(folder, start, iter([point])) == 1
        second = min(num_points - 1, 7 * point % num_points)
        run_with_kills(tmp_path / f"twice{point}", start, iter([point, second, 3 * point % 40]))
