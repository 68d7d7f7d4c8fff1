"""prepare, killed anywhere and started again: ends with the bytes of a calm run, and keeps what was done."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.journal import FOLDER
from tests.conftest import ROOT
from tests.integration.kill_bench import (
    FORMATS,
    NUM_IMAGES,
    NUM_PROBES,
    Bench,
    assert_calm,
    content_of,
    num_kept,
    open_bench,
)
from tests.unit.data_prep.test_pipeline import _session_members


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


def kill_and_finish(bench: Bench, out: Path, shard_format: str, kills: list[dict[str, Any]]) -> None:
    """Start with each of the kills, then until it ends; look at the folder in between."""
    shutil.rmtree(out, ignore_errors=True)
    for kill in (*kills, {}):
        has_plan = (out / FOLDER / "plan.json").exists() or shard_format == "ffcv"
        done = (out / "manifest.json").exists()
        kept = sum(NUM_IMAGES.values()) if done else num_kept(out, shard_format)
        ended = bench.start(out, shard_format, **kill)
        assert ended.status in ((0, -signal.SIGKILL) if kill else (0,)), ended.text
        most = sum(NUM_IMAGES.values()) - kept + (0 if has_plan or done else NUM_PROBES)
        assert ended.num_normalized <= most, f"{ended.num_normalized} normalised, {kept} had been done"
        if kept and not kill and not done:
            assert "kept from the interrupted run" in ended.text
        # As `verify` would find, only sooner: whatever is there under its name is whole.
        named = {name: digest for name, digest in content_of(out).items() if not name.startswith(".")}
        assert named.items() <= bench.calm[shard_format].items()
        assert "manifest.json" not in named or named == bench.calm[shard_format]
    assert_calm(bench, out, shard_format)


@pytest.mark.parametrize("shard_format", FORMATS)
@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_seeded_points(bench: Bench, tmp_path: Path, shard_format: str, count: int) -> None:
    generator = random.Random(1)
    num_points = 3 * len(bench.operations[shard_format])
    for points in [generator.sample(range(num_points), 1 + number % 2) for number in range(count)]:
        kill_and_finish(bench, tmp_path / "out", shard_format, [{"point": point} for point in points])


def test_killed_before_a_beton_has_its_name(bench: Bench, tmp_path: Path) -> None:
    """Then all records stand and the file does not."""
    finishes = [number for number, kind in enumerate(bench.operations["ffcv"]) if kind == "f"]
    assert len(finishes) == 2
    for number in finishes:
        for point in (3 * number, 3 * number + 1, 3 * number + 2):
            kill_and_finish(bench, tmp_path / "out", "ffcv", [{"point": point}])


@pytest.mark.long
@pytest.mark.parametrize("shard_format", FORMATS)
def test_killed_at_every_point(bench: Bench, tmp_path: Path, shard_format: str) -> None:
    for point in range(3 * len(bench.operations[shard_format])):
        kill_and_finish(bench, tmp_path / "out", shard_format, [{"point": point}])


@pytest.mark.long
@pytest.mark.parametrize("shard_format", FORMATS)
def test_killed_at_random_times(bench: Bench, tmp_path: Path, shard_format: str) -> None:
    generator = random.Random(2)
    for _ in range(60):
        kills = [{"signal": signal.SIGKILL, "after": generator.uniform(0, 0.3)} for _ in range(2)]
        kill_and_finish(bench, tmp_path / "out", shard_format, kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
def test_told_to_stop_at_random_times(bench: Bench, tmp_path: Path, number: int, count: int) -> None:
    generator = random.Random(number)
    for turn in range(count):
        shard_format, out = FORMATS[turn % 2], tmp_path / str(turn % 2)
        ended = bench.start(out, shard_format, signal=number, after=generator.uniform(0, 0.25))
        assert ended.status in (0, 130), ended.text
        assert "Traceback" not in ended.text and "rror" not in ended.text, ended.text
        if ended.status == 130:
            assert ended.text.count("interrupted: what is finished is kept") == 1
        else:
            shutil.rmtree(out)
    for shard_format, out in zip(FORMATS, (tmp_path / "0", tmp_path / "1"), strict=True):
        assert bench.start(out, shard_format).status == 0
        assert_calm(bench, out, shard_format)


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.long)])
def test_real_processes_told_to_stop(bench: Bench, tmp_path: Path, count: int) -> None:
    """With worker processes; Ctrl-C goes to all of them, as a terminal sends it."""
    generator = random.Random(3)
    for turn in range(count):
        shard_format, out = FORMATS[turn // 2 % 2], tmp_path / str(turn // 2 % 2)
        words = [sys.executable, "-m", "data_prep", *bench.words(out, shard_format, "--workers", "2")]
        with (tmp_path / "text").open("w+b") as text:
            process = subprocess.Popen(words, cwd=ROOT, stdout=text, stderr=text, start_new_session=True)
            while process.poll() is None and not os.fstat(text.fileno()).st_size:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 2.5))
            if turn % 2:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(signal.SIGTERM)
            status = process.wait(15)
            text.seek(0)
            said = text.read().decode()
        assert status in (0, 130), said
        assert "Traceback" not in said and "rror" not in said, said
        assert status == 0 or said.count("interrupted: what is finished is kept") == 1
        deadline = time.monotonic() + 10
        while _session_members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _session_members(process.pid) == []
    for shard_format, out in list(zip(FORMATS, (tmp_path / "0", tmp_path / "1"), strict=True))[: count // 2]:
        assert bench.start(out, shard_format).status == 0
        assert_calm(bench, out, shard_format)
