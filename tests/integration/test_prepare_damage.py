"""prepare, interrupted and started again after something changed: damage, settings, workers, the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_prep import storage, workers
from data_prep.journal import FOLDER, _opened, _sealed
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from tests.integration.kill_bench import (
    FORMATS,
    NUM_IMAGES,
    Bench,
    assert_calm,
    num_kept,
    open_bench,
    records,
)
from tests.unit.data_prep.test_pipeline import damage_byte


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


def half_done(bench: Bench, out: Path, shard_format: str, *more: str) -> None:
    """A start that was killed when train was about half done."""
    # Of a tar, 5 operations: piece, finish, .idx, record, and what came before the first.
    point = 3 * (len(bench.operations[shard_format]) // 4 + 2)
    assert bench.start(out, shard_format, *more, point=point).status == -signal.SIGKILL
    assert len(records(out, "train")) >= 2


@pytest.mark.parametrize("shard_format", FORMATS)
@pytest.mark.parametrize("damage", ["rows", "cut", "empty", "other fingerprint", "not a record"])
def test_damaged_record_is_done_again(bench: Bench, tmp_path: Path, shard_format: str, damage: str) -> None:
    half_done(bench, tmp_path, shard_format)
    path = sorted((tmp_path / FOLDER).glob("train-*.json"))[0]
    content = path.read_bytes()
    kept = num_kept(tmp_path, shard_format)
    if damage == "rows":
        place = content.index(b'"rows":"') + 30  # still base64, still JSON
        content = (
            content[:place] + (b"A" if content[place : place + 1] != b"A" else b"B") + content[place + 1 :]
        )
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    elif damage == "other fingerprint":
        fields = json.loads(_opened(content)) | {"fingerprint": "0" * 64}
        content = _sealed(json.dumps(fields))
    else:
        content = _sealed("[1, 2]")
    path.write_bytes(content)
    ended = bench.start(tmp_path, shard_format)
    assert ended.status == 0, ended.text
    assert ended.num_normalized > sum(NUM_IMAGES.values()) - kept
    assert_calm(bench, tmp_path, shard_format)


def test_damaged_plan_is_made_again(bench: Bench, tmp_path: Path) -> None:
    half_done(bench, tmp_path, "dali")
    path = tmp_path / FOLDER / "plan.json"
    text = path.read_text()
    path.write_text(text.replace('["train", 1, ', '["train", 1, 1'))
    assert path.read_text() != text
    assert bench.start(tmp_path, "dali").status == 0
    assert_calm(bench, tmp_path, "dali")


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.idx"])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "zeroed"])
def test_damaged_shard_is_written_again(bench: Bench, tmp_path: Path, name: str, damage: str) -> None:
    half_done(bench, tmp_path, "dali")
    damage_file(tmp_path / name, damage)
    kept = num_kept(tmp_path, "dali") - (
        records(tmp_path, "train")[1]["stop"] - records(tmp_path, "train")[1]["start"]
    )
    ended = bench.start(tmp_path, "dali")
    assert ended.status == 0 and ended.num_normalized == sum(NUM_IMAGES.values()) - kept
    assert_calm(bench, tmp_path, "dali")


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "zeroed"])
def test_power_cut_took_pieces_of_a_beton(bench: Bench, tmp_path: Path, damage: str) -> None:
    half_done(bench, tmp_path, "ffcv")
    damage_file(tmp_path / ".train.beton.partial", damage)
    ended = bench.start(tmp_path, "ffcv")
    assert ended.status == 0, ended.text
    assert_calm(bench, tmp_path, "ffcv")


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_damaged_finished_beton_is_written_again(bench: Bench, tmp_path: Path, damage: str) -> None:
    point = 3 * (len(bench.operations["ffcv"]) - 12)
    bench.start(tmp_path, "ffcv", point=point)
    damage_file(tmp_path / "train.beton", damage)
    ended = bench.start(tmp_path, "ffcv")
    assert ended.status == 0 and ended.num_normalized >= NUM_IMAGES["train"]
    assert_calm(bench, tmp_path, "ffcv")


def damage_file(path: Path, damage: str) -> None:
    size = path.stat().st_size
    if damage == "byte":
        damage_byte(path, size // 2)
    elif damage == "cut":
        os.truncate(path, size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.seek(size // 3)
            file.write(bytes(size - size // 3))


def test_other_settings_or_format_keep_nothing(bench: Bench, tmp_path: Path) -> None:
    others = [("dali", "--quality", "50"), ("ffcv", "--seed", "1"), ("ffcv",), ("dali", "--shard-mb", "2")]
    for last in FORMATS:
        for shard_format, *more in others:
            half = bench.start(tmp_path, shard_format, *more, point=40)
            assert half.status == -signal.SIGKILL
        ended = bench.start(tmp_path, last)
        assert ended.status == 0 and "kept" not in ended.text
        assert ended.num_normalized >= sum(NUM_IMAGES.values())
        assert_calm(bench, tmp_path, last)
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_other_number_of_workers(bench: Bench, tmp_path: Path, shard_format: str) -> None:
    half_done(bench, tmp_path, shard_format, "--workers", "3")
    kept = num_kept(tmp_path, shard_format)
    ended = bench.start(tmp_path, shard_format, "--workers", "1")
    assert ended.status == 0 and ended.num_normalized == sum(NUM_IMAGES.values()) - kept
    assert_calm(bench, tmp_path, shard_format)


@pytest.mark.parametrize("shard_format", FORMATS)
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_full_disk(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_format: str, call: str
) -> None:
    monkeypatch.setattr(workers, "build_pool", ThreadPoolExecutor)
    monkeypatch.setattr(storage, "DISK_FULL_WAITS", (0.0,))
    original, num_calls = getattr(os, call), 0

    def full(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    options = PrepareOptions(
        out=tmp_path / "out",
        format=shard_format,
        num_workers=2,
        shard_bytes=1 << 20,
        progress=False,  # type: ignore[arg-type]
    )
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="the disk is full: free some space"),
    ):
        patch.setattr(os, call, full)
        prepare(open_source(bench.source), options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    ended = bench.start(tmp_path / "out", shard_format)
    assert ended.status == 0 and "kept" in ended.text
    assert_calm(bench, tmp_path / "out", shard_format)
