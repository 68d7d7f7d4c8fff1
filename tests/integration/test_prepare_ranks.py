"""prepare on several ranks: the bytes of a single process, whoever dies; no rank waits in vain.

Most ranks are children of a nursery (see die_at.py) with RANK and WORLD_SIZE set by hand; two use torchrun.
"""

from __future__ import annotations

import json
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

from data_prep.journal import FOLDER, _sealed
from data_prep.verify import verify
from tests.conftest import ROOT
from tests.integration.die_at import Ended, Nursery, Start
from tests.integration.kill_bench import Bench, content_of, records
from tests.unit.data_prep.test_pipeline import _session_members, damage_byte
from tests.unit.data_prep.test_tar_shards import write_noise_folder

NUM_IMAGES = 150


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("ranks")
    source = write_noise_folder(root / "source", num_train=40, num_val=10)
    with Nursery(source) as nursery:
        bench = Bench(source, nursery, {}, {})
        ended = bench.start(root / "calm", "dali")
        assert ended.status == 0, ended.text
        bench.calm["dali"] = content_of(root / "calm")
        bench.operations["dali"] = ended.operations
        assert verify(root / "calm", progress=False, num_workers=1)[1] == []
        yield bench


def start_ranks(
    bench: Bench, out: Path, world_size: int, kill: dict[int, dict[str, Any]] | None = None, **env: str
) -> list[Ended]:
    starts = [
        Start(
            bench.words(out, "dali"),
            env={"RANK": str(rank), "WORLD_SIZE": str(world_size), "PREPARE_QUIET_SECONDS": "2", **env},
            **(kill or {}).get(rank, {}),
        )
        for rank in range(world_size)
    ]
    return bench.nursery.start_together(*starts, seconds=30)


def assert_calm(bench: Bench, out: Path) -> None:
    assert content_of(out) == bench.calm["dali"]


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_same_bytes_and_rank_0_speaks(bench: Bench, tmp_path: Path, world_size: int) -> None:
    ended = start_ranks(bench, tmp_path, world_size)
    assert [end.status for end in ended] == [0] * world_size, ended
    assert_calm(bench, tmp_path)
    assert "recognised" in ended[0].text and "prepared 120 train, 30 val" in ended[0].text
    assert [end.text for end in ended[1:]] == [""] * (world_size - 1)
    again = start_ranks(bench, tmp_path, world_size)
    assert [end.status for end in again] == [0] * world_size
    assert [end.num_normalized for end in again] == [0] * world_size
    assert_calm(bench, tmp_path)


def test_slow_rank_is_waited_for(bench: Bench, tmp_path: Path) -> None:
    """And a record of the interrupted start counts for nothing until its rank has looked at the shard."""
    before_manifest = 3 * bench.operations["dali"].rindex("w")
    assert bench.start(tmp_path, "dali", point=before_manifest).status == -signal.SIGKILL
    assert len(records(tmp_path, "train")) >= 3 and not (tmp_path / "manifest.json").exists()
    damage_byte(tmp_path / "train-00001.tar", 5000)
    ended = start_ranks(bench, tmp_path, 2, {1: {"pause": 0.1}}, PREPARE_QUIET_SECONDS="20")
    assert [end.status for end in ended] == [0, 0], ended
    assert_calm(bench, tmp_path)


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.long)])
def test_killed_ranks_then_any_world_size(bench: Bench, tmp_path: Path, count: int) -> None:
    generator = random.Random(4)
    for _ in range(count):
        shutil.rmtree(tmp_path)
        world_size = generator.choice((2, 3))
        point = generator.randrange(3 * len(bench.operations["dali"]) // world_size)
        kill = {generator.randrange(world_size): {"point": point}}
        ended = start_ranks(bench, tmp_path, world_size, kill, PREPARE_MEET_SECONDS="2")
        assert all("STILL RUNNING" not in end.text and "Traceback" not in end.text for end in ended), ended
        died = [end for end in ended if end.status == -signal.SIGKILL]
        finished = (tmp_path / "manifest.json").exists()
        assert finished or not died or any(end.status == 1 for end in ended) or ended[0] in died
        kept = sum(r["stop"] - r["start"] for s in ("train", "val") for r in records(tmp_path, s))
        again = start_ranks(bench, tmp_path, generator.choice((1, 2, 3)))
        assert [end.status for end in again] == [0] * len(again), again
        # The plan may have to be made again: that probes train, and val twice.
        assert sum(end.num_normalized for end in again) <= NUM_IMAGES - kept + (0 if kept else 180)
        assert not kept or finished or len(again) > 1 or "kept" in again[0].text
        assert_calm(bench, tmp_path)


def test_other_source_is_told_at_once(bench: Bench, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bench.source, tmp_path / "other"))
    (other / "train" / "class_0" / "00.jpg").unlink()
    env = {"WORLD_SIZE": "3"}
    starts = [
        Start(bench.words(tmp_path / "out", "dali"), env=env | {"RANK": str(rank)}) for rank in (0, 1, 2)
    ]
    starts[1].words[2] = str(other)
    begun = time.monotonic()
    ended = bench.nursery.start_together(*starts, seconds=30)
    assert time.monotonic() - begun < 8
    assert [end.status for end in ended] == [1, 1, 1]
    assert "error: rank 1 sees other source files or settings" in ended[0].text
    assert ended[1].text.startswith("rank 1: error: rank 1 sees other source files")
    assert "rank 2: error: rank 0 has stopped" in ended[2].text


def test_other_world_size_is_told_at_once(bench: Bench, tmp_path: Path) -> None:
    starts = [
        Start(bench.words(tmp_path, "dali"), env={"RANK": str(rank), "WORLD_SIZE": str(2 + rank)})
        for rank in (0, 1)
    ]
    assert [end.status for end in bench.nursery.start_together(*starts, seconds=30)] == [1, 1]


def test_output_that_is_not_shared(bench: Bench, tmp_path: Path) -> None:
    starts = [
        Start(
            bench.words(tmp_path / f"out{rank}", "dali"),
            env={"RANK": str(rank), "WORLD_SIZE": "2", "PREPARE_MEET_SECONDS": "1"},
        )
        for rank in (0, 1)
    ]
    ended = bench.nursery.start_together(*starts, seconds=20)
    assert [end.status for end in ended] == [1, 1]
    assert "not all of the 2 ranks have come to" in ended[0].text and "share" in ended[0].text
    assert "rank 1 does not hear from rank 0 in" in ended[1].text and "share" in ended[1].text


def test_stale_files_mislead_nobody(bench: Bench, tmp_path: Path) -> None:
    words = [*bench.words(tmp_path, "dali"), "--quality", "70"]
    env = {"WORLD_SIZE": "2", "PREPARE_QUIET_SECONDS": "2"}
    starts = [Start(words, env=env | {"RANK": "0"}, point=60), Start(words, env=env | {"RANK": "1"})]
    bench.nursery.start_together(*starts, seconds=30)
    folder = tmp_path / FOLDER
    assert records(tmp_path, "train")
    for rank in (1, 2):
        old = {"nonce": "old", "run": "old", "planned": "old", "stopped": "old"}
        (folder / f"rank-{rank}.json").write_bytes(_sealed(json.dumps(old)))
    (folder / "stopped.json").write_bytes(_sealed(json.dumps({"stopped": "old"})))
    (folder / "meeting.json").write_bytes(b"00000000\n{damaged")
    ended = start_ranks(bench, tmp_path, 3)
    assert [end.status for end in ended] == [0, 0, 0], ended
    assert_calm(bench, tmp_path)


def test_too_many_bad_files_on_all_ranks_together(bench: Bench, tmp_path: Path) -> None:
    source = Path(shutil.copytree(bench.source, tmp_path / "source"))
    for label in range(3):
        for number in range(4):
            (source / "train" / f"class_{label}" / f"bad{number}.jpg").write_bytes(b"junk")
    starts = [
        Start(
            ["prepare", "--source", str(source), *bench.words(tmp_path / "out", "dali")[3:]],
            env={"RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in (0, 1, 2)
    ]
    ended = bench.nursery.start_together(*starts, seconds=30)  # 12 of 162; 9 are allowed
    assert ended[0].status == 1 and "STILL RUNNING" not in "".join(end.text for end in ended)
    assert (
        "error: too many files cannot be used (--max-bad-fraction 0.05): 12 × not an image" in ended[0].text
    )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_rank_that_stops_is_told_to_rank_0(bench: Bench, tmp_path: Path) -> None:
    """Rank 1 alone meets a folder where its shard should be."""
    (tmp_path / "train-00001.tar").mkdir()
    begun = time.monotonic()
    ended = start_ranks(bench, tmp_path, 2, PREPARE_QUIET_SECONDS="25")
    assert time.monotonic() - begun < 12
    assert [end.status for end in ended] == [1, 1]
    assert "error: rank 1 has stopped: see its output" in ended[0].text
    (tmp_path / "train-00001.tar").rmdir()
    assert start_ranks(bench, tmp_path, 1)[0].status == 0
    assert_calm(bench, tmp_path)


def torchrun(bench: Bench, out: Path, num_ranks: int, shard_format: str = "dali") -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m", "data_prep"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *bench.words(out, shard_format, "--workers", "1")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_torchrun_gives_the_same_bytes(bench: Bench, tmp_path: Path, num_ranks: int) -> None:
    process = torchrun(bench, tmp_path, num_ranks)
    text = process.communicate(timeout=90)[0]
    assert process.returncode == 0, text
    assert text.count("recognised ") == 1 and text.count("found = 150 prepared") == 1 and "rank 1" not in text
    assert_calm(bench, tmp_path)


def test_torchrun_rank_killed_then_without_torchrun(bench: Bench, tmp_path: Path) -> None:
    process = torchrun(bench, tmp_path, 2)
    while process.poll() is None and not len(records(tmp_path, "train")) >= 2:
        time.sleep(0.02)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.monotonic() - killed < 35, text
    kept = sum(r["stop"] - r["start"] for s in ("train", "val") for r in records(tmp_path, s))
    ended = start_ranks(bench, tmp_path, 1)[0]
    assert ended.status == 0 and kept and ended.num_normalized == NUM_IMAGES - kept
    assert_calm(bench, tmp_path)


def pid_of_rank(launcher: int, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(path.parent.name)
    raise AssertionError(f"no rank {rank} of {_session_members(launcher)}")


def test_ffcv_on_several_ranks_is_refused(bench: Bench, tmp_path: Path) -> None:
    starts = [
        Start(bench.words(tmp_path, "ffcv"), env={"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)
    ]
    ended = bench.nursery.start_together(*starts, seconds=20)
    assert [end.status for end in ended] == [1, 1]
    assert ended[0].text.count("error: one .beton a split cannot be divided among ranks") == 1
    assert ended[1].text == "" and "Traceback" not in ended[0].text
