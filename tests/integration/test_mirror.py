"""The copy of a run in S3: a fresh machine goes on from it, whatever S3 and other writers do meanwhile."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import s3
from tests.conftest import ROOT
from tests.integration.mirror_nursery import Nursery
from tests.integration.mirror_runs import (
    FakeRun,
    assert_clean,
    assert_no_secret,
    expected_of,
    files_of,
    whole_latest,
)
from tests.integration.s3_server import Asked, Bucket, Rule
from train.checkpoint import CheckpointStore, mirror, transfer
from train.checkpoint.mirror import CheckpointMirror, mirror_fault

MIB = 1 << 20
DEADLINE = 60.0
AT = "runs/demo"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "MOST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "HURRY_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 5 * MIB)


class Mirrors:
    """Makes mirrors of one place, and closes them."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.said: list[str] = []
        self.lost: list[CheckpointMirror] = []
        self._made: list[CheckpointMirror] = []

    def __call__(self, prefix: str = AT) -> CheckpointMirror:
        made = CheckpointMirror(
            self.bucket.at(prefix), self.said.append, on_taken_over=lambda: self.lost.append(made)
        )
        self._made.append(made)
        return made

    def close(self) -> None:
        self.bucket.server.clear()
        for made in self._made:
            made.close(DEADLINE)


@pytest.fixture
def mirrors(bucket: Bucket) -> Iterator[Mirrors]:
    made = Mirrors(bucket)
    yield made
    made.close()
    assert_no_secret(made.said)


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "demo")


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def upload(mirrors: Mirrors, run: FakeRun, *steps: int, **options: Any) -> CheckpointMirror:
    """A writer that has uploaded `steps`, has deleted what was before, and is closed."""
    writer = mirrors()
    for step in steps:
        writer.submit(run.folder, run.save(step, **options))
        assert writer.wait(DEADLINE), writer.trouble
    writer.close(DEADLINE)
    return writer


def meanwhile(bucket: Bucket, when: Callable[[Asked], bool], act: Callable[[], Any]) -> None:
    """Do something while the first request of a kind is on its way."""
    note, acted = bucket.server._note, threading.Event()

    def wrapped(asked: Asked) -> str:
        if when(asked) and not acted.is_set():
            acted.set()
            act()
        return note(asked)

    # Not in the rule: the proxy asks that of one request at a time.
    bucket.server._note = wrapped  # type: ignore[method-assign]


def settle(writer: CheckpointMirror) -> None:
    until(lambda: not writer._writer._unnamed, "what is no longer named goes")


def assert_restored(folder: Path, run: FakeRun) -> None:
    """As on the machine that was lost, but for the checkpoints between the best and the newest."""
    files = files_of(folder)
    manifest = CheckpointStore(folder / "checkpoints").manifest()
    del files["checkpoints/manifest.json"]
    assert files == expected_of(run)
    assert manifest.best == run.manifest.best
    assert manifest.checkpoints[-1] == run.manifest.checkpoints[-1]
    assert {f"checkpoints/{entry.name}" for entry in manifest.checkpoints} < set(files)


def test_a_fresh_machine_goes_on_byte_for_byte(bucket: Bucket, mirrors: Mirrors, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "demo", num_bytes=6 * MIB)
    writer = mirrors()
    assert writer.restore(run.folder) is None
    writer.claim()
    for step in (10, 20, 30, 40):
        writer.submit(run.folder, run.save(step, is_best=step == 20))
        assert writer.wait(DEADLINE), writer.trouble
    settle(writer)
    latest = assert_clean(bucket, AT)
    assert [item.step for item in latest.checkpoints] == [20, 30, 40] and latest.step == 40
    assert latest.manifest == run.manifest and latest.run == "demo"
    fresh = tmp_path / "fresh" / "demo"
    assert mirrors().restore(fresh) == 40
    assert_restored(fresh, run)
    bucket.server.clear()
    assert mirrors().restore(fresh) is None, "nothing is newer"
    assert [asked.operation for asked in bucket.server.asked] == ["GetObject"]
    assert not [line for line in mirrors.said if "warning" in line]


FAULTS = ("503 SlowDown", "500 InternalError", "drop", "drop-upload", "drop-answer", "drop-half", "stall:0.1")


def storm(seed: int, share: float, *faults: str) -> Rule:
    """A share of the requests fails, in all the ways one after the other."""
    generator, turn = random.Random(seed), list(faults)
    only = {"flip-upload": ("PutObject", "UploadPart"), "flip-download": ("GetObject",)}

    def rule(asked: Asked) -> str | None:
        if generator.random() >= share or asked.operation not in only.get(turn[0], (asked.operation,)):
            return None
        turn.append(turn.pop(0))
        return turn[-1]

    return rule


@pytest.mark.parametrize(
    ("share", "faults"),
    [
        # Not one flip after the other: the second would mend what the first one did.
        (0.25, ("flip-upload", *FAULTS, "flip-download")),
        pytest.param(0.5, FAULTS, marks=pytest.mark.long),
    ],
)
def test_s3_that_fails_stalls_and_corrupts(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path, share: float, faults: tuple[str, ...]
) -> None:
    bucket.server.clear(storm(1, share, *faults))
    writer = mirrors()
    writer.claim()
    for step in range(1, 6):
        run.num_bytes = 6 * MIB if step == 2 else 1000
        writer.submit(run.folder, run.save(step))
        assert writer.wait(DEADLINE), writer.trouble
        assert whole_latest(bucket, AT).step == step
    assert {asked.fault for asked in bucket.server.asked} > set(faults)
    warnings = [line for line in mirrors.said if "is not up to date" in line]
    assert len(warnings) == len([line for line in mirrors.said if "works again" in line])
    fresh = tmp_path / "fresh" / "demo"
    assert mirrors().restore(fresh) == 5
    assert_restored(fresh, run)
    bucket.server.clear()
    writer.close(DEADLINE)
    upload(mirrors, run, 6)
    assert_clean(bucket, AT)


LONG = [pytest.param(fault, marks=pytest.mark.long) for fault in ("403 AccessDenied", "drop")]


@pytest.mark.parametrize(
    ("operation", "fault"), [("UploadPart", "flip-upload"), ("GetObject", "flip-download")]
)
def test_a_piece_that_arrives_changed_is_sent_again(
    bucket: Bucket, mirrors: Mirrors, tmp_path: Path, operation: str, fault: str
) -> None:
    run = FakeRun(tmp_path / "demo", num_bytes=6 * MIB)
    first = []

    def rule(asked: Asked) -> str | None:
        if asked.operation == operation and "step-" in asked.key and not first:
            first.append(asked)
            return fault
        return None

    bucket.server.clear(rule)
    upload(mirrors, run, 1)
    assert first and assert_clean(bucket, AT).step == 1
    assert mirrors.said == []


@pytest.mark.parametrize("fault", ["503 SlowDown", "400 ExpiredToken", *LONG])
def test_an_outage_is_said_once_and_its_end(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket.server.clear(lambda asked: fault)
    writer = mirrors()
    writer.claim()
    for step in range(1, 4):
        writer.submit(run.folder, run.save(step))
        assert not writer.wait(timeout_seconds=0.2)
    until(lambda: len(bucket.server.asked) > 4, "it tries on")
    assert len(mirrors.said) == 1 and "training goes on" in mirrors.said[0]
    bucket.server.clear()
    assert writer.wait(DEADLINE)
    assert len(mirrors.said) == 2 and "works again" in mirrors.said[1]
    assert whole_latest(bucket, AT).step == 3
    assert capfd.readouterr().err == "", "not a line a request"


def test_files_may_go_while_they_are_uploaded(bucket: Bucket, mirrors: Mirrors, tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "demo", num_bytes=6 * MIB)
    manifest = run.save(1)
    begun, gone = threading.Event(), threading.Event()

    def hold(asked: Asked) -> None:
        if asked.operation in ("ListObjectsV2", "UploadPart"):
            begun.set()
            gone.wait(DEADLINE)

    bucket.server.clear(hold)
    writer = mirrors()
    writer.submit(run.folder, manifest)
    assert begun.wait(DEADLINE)
    for step in (2, 3, 4):
        run.save(step, is_best=True, keep_last=1)
    (run.folder / "recipe.yaml").unlink()
    (run.folder / "checkpoints" / "step-00000001.pt").write_bytes(b"another file of that name")
    gone.set()
    assert writer.wait(DEADLINE)
    latest = whole_latest(bucket, AT)
    assert latest.manifest == manifest
    assert "recipe.yaml" in {file.name for file in latest.files}


def test_the_newest_state_wins(bucket: Bucket, mirrors: Mirrors, run: FakeRun) -> None:
    held = threading.Event()
    bucket.server.clear(lambda asked: None if held.wait(DEADLINE) else "drop")
    writer = mirrors()
    for step in range(1, 20):
        writer.submit(run.folder, run.save(step, is_best=True, keep_last=1))
    assert not writer.wait(timeout_seconds=0.1), "bounded"
    held.set()
    assert writer.wait(DEADLINE)
    assert whole_latest(bucket, AT).step == 19
    uploaded = {asked.key.split("-")[1] for asked in bucket.server.all("PutObject") if "step-" in asked.key}
    assert len(uploaded) <= 2, "the one under way, and the newest"


def test_what_is_damaged_here_is_not_mirrored(bucket: Bucket, mirrors: Mirrors, run: FakeRun) -> None:
    run.save(1)
    manifest = run.save(2)
    (run.folder / "checkpoints" / manifest.checkpoints[-1].name).write_bytes(bytes(1000))
    writer = mirrors()
    writer.submit(run.folder, manifest)
    assert writer.wait(DEADLINE)
    latest = whole_latest(bucket, AT)
    assert latest.step == 1 and [item.step for item in latest.checkpoints] == [1]
    assert "step-00000002.pt is damaged" in mirrors.said[0] and len(mirrors.said) == 1
    (run.folder / "checkpoints" / manifest.checkpoints[0].name).unlink()
    writer.submit(run.folder, manifest)
    assert "step 2 is not mirrored: FileNotFoundError" in mirrors.said[1]


def test_a_mirror_that_was_emptied_is_filled_again(bucket: Bucket, mirrors: Mirrors, run: FakeRun) -> None:
    writer = mirrors()
    writer.submit(run.folder, run.save(1))
    assert writer.wait(DEADLINE)
    bucket.empty()
    writer.submit(run.folder, run.save(2))
    assert writer.wait(DEADLINE)
    settle(writer)
    assert len(assert_clean(bucket, AT).checkpoints) == 2


def test_the_newest_is_named_before_older_ones_are_there(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun
) -> None:
    """A stop may leave time for one checkpoint only, and a fresh machine wants the newest."""
    run.save(1)
    run.save(2)
    writer = mirrors()
    bucket.server.clear(lambda asked: "503 SlowDown" if "step-00000001" in asked.key else None)
    writer.submit(run.folder, run.save(3))
    until(
        lambda: "latest.json" in bucket.files(AT) and whole_latest(bucket, AT).step == 3,
        "it names the newest",
    )
    assert not writer.wait(0.2)
    latest = whole_latest(bucket, AT)
    assert [item.step for item in latest.checkpoints][-1] == latest.step == 3
    assert not any(item.step == 1 for item in latest.checkpoints)
    bucket.server.clear()
    assert writer.wait(DEADLINE)
    assert any(item.step == 1 for item in whole_latest(bucket, AT).checkpoints)


# Two writers


def test_a_writer_that_was_taken_over_touches_nothing(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    former = mirrors()
    former.submit(run.folder, run.save(1))
    assert former.wait(DEADLINE)
    elsewhere = FakeRun(tmp_path / "elsewhere" / "demo")
    shutil.rmtree(elsewhere.folder)
    other = mirrors()
    assert other.restore(elsewhere.folder) == 1
    other.claim()
    other.submit(elsewhere.folder, elsewhere.save(2))
    assert other.wait(DEADLINE)
    settle(other)
    before = bucket.files(AT)
    bucket.server.clear()
    for step in (3, 4):
        former.submit(run.folder, run.save(step, is_best=True, keep_last=1))
        assert not former.wait(DEADLINE)
    assert former.taken_over and mirrors.lost == [former]
    assert bucket.files(AT) == before
    assert {asked.operation for asked in bucket.server.asked} == {"GetObject"}
    assert len([line for line in mirrors.said if "took over the mirror" in line]) == 1
    assert assert_clean(bucket, AT).step == 2


def test_a_late_write_of_a_former_writer_is_refused(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    former = mirrors()
    former.submit(run.folder, run.save(1))
    assert former.wait(DEADLINE)
    elsewhere = tmp_path / "elsewhere" / "demo"

    def take_over() -> None:
        other = mirrors()
        assert other.restore(elsewhere) == 1
        other.claim()
        until(lambda: other._writer._latest, "it has the mirror")

    meanwhile(
        bucket, lambda asked: (asked.operation, asked.key) == ("PutObject", f"{AT}/latest.json"), take_over
    )
    former.submit(run.folder, run.save(2, keep_last=1, is_best=True))
    assert not former.wait(DEADLINE) and former.taken_over
    latest = whole_latest(bucket, AT)
    assert latest.step == 1 and latest.writer != former._writer._id


def fight(bucket: Bucket, mirrors: Mirrors, tmp_path: Path, rounds: int) -> None:
    """In each round a new writer comes while the last one's writes are under way, and answers get lost."""
    faults = ("drop-answer", "drop-answer", "drop", "500 InternalError", "409 ConditionalRequestConflict")
    bucket.server.clear(storm(3, 0.25, *faults))
    run = FakeRun(tmp_path / "demo")
    writers = [mirrors()]
    writers[0].claim()
    watching = threading.Event()
    faults_seen: list[BaseException] = []

    def watch() -> None:
        while not watching.is_set():
            try:
                whole_latest(bucket, AT)
            except bucket.s3.exceptions.NoSuchKey:
                pass  # nobody wrote it yet
            except BaseException as error:
                faults_seen.append(error)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    step = 0
    for number in range(rounds):
        one, two = writers[-1], mirrors()
        generator = random.Random(number)
        two._writer.seen_step = 1 << 40  # it has compared, and may take over
        time.sleep(generator.random() * 0.05)
        two.claim()
        while not (one.taken_over or two.taken_over):
            step += 1
            manifest = run.save(step, is_best=generator.random() < 0.3)
            for writer in generator.sample([one, two], 2):
                writer.submit(run.folder, manifest)
            time.sleep(generator.random() * 0.05)
        winner = two if one.taken_over else one
        assert winner.wait(DEADLINE), winner.trouble
        assert not winner.taken_over, "exactly one wins"
        latest = whole_latest(bucket, AT)
        assert latest.writer == winner._writer._id and latest.step == step
        assert not faults_seen, faults_seen[0]
        writers.append(winner)
    watching.set()
    watcher.join()
    assert not faults_seen
    bucket.server.clear()
    writers[-1].submit(run.folder, run.save(step + 1))
    assert writers[-1].wait(DEADLINE)
    writers[-1].close(DEADLINE)
    upload(mirrors, run, step + 2)
    assert_clean(bucket, AT)


def test_two_writers_fight_and_answers_get_lost(bucket: Bucket, mirrors: Mirrors, tmp_path: Path) -> None:
    fight(bucket, mirrors, tmp_path, rounds=3)


@pytest.mark.long
def test_many_writers_fight(bucket: Bucket, mirrors: Mirrors, tmp_path: Path) -> None:
    fight(bucket, mirrors, tmp_path, rounds=60)


def test_a_mirror_that_is_further_is_left_alone_until_it_is_passed(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    """S3 was gone when an old machine came back, and another one had trained on meanwhile."""
    upload(mirrors, run, 1)
    old = FakeRun(tmp_path / "old" / "demo")
    old.save(1)
    upload(mirrors, run, 5)
    bucket.server.clear(lambda asked: "500 InternalError")
    writer = mirrors()
    assert writer.restore(old.folder) is None
    assert "going on from step 1" in mirrors.said[-1]
    writer.claim()
    bucket.server.clear()
    for step in (3, 4):
        writer.submit(old.folder, old.save(step))
        assert not writer.wait(timeout_seconds=0.3)
        assert whole_latest(bucket, AT).step == 5
    assert "it holds step 5" in (writer.trouble or "")
    writer.submit(old.folder, old.save(6))
    assert writer.wait(DEADLINE)
    assert whole_latest(bucket, AT).step == 6


# Going on from it


def test_the_local_folder_wins_unless_it_is_older(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    upload(mirrors, run, 1, 2)
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy" / "demo"))
    (copy / "metrics.jsonl").write_bytes(b"its own\n")
    before = files_of(copy)
    assert mirrors().restore(copy) is None and files_of(copy) == before
    upload(mirrors, run, 3, is_best=True)
    (copy / "checkpoints" / "step-00000003.pt").write_bytes(b"of a save that died")
    bucket.server.clear()
    assert mirrors().restore(copy) == 3
    files = files_of(copy)
    assert {name: files[name] for name in expected_of(run)} == expected_of(run)
    assert CheckpointStore(copy / "checkpoints").manifest().best == "step-00000003.pt"


def of_step(bucket: Bucket, step: int) -> str:
    return next(f"{AT}/{item.key}" for item in whole_latest(bucket, AT).checkpoints if item.step == step)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_the_one_before_a_damaged_checkpoint(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path, how: str
) -> None:
    upload(mirrors, run, 1, 2, 3)
    key = of_step(bucket, 3)
    if how == "damaged":
        bucket.flip(key, 500)
    else:
        bucket.s3.delete_object(Bucket=bucket.name, Key=key)
    fresh = tmp_path / "fresh" / "demo"
    writer = mirrors()
    assert writer.restore(fresh) == 2
    warnings = [line for line in mirrors.said if line.startswith("warning")]
    assert len(warnings) == 1 and "step-00000003.pt" in warnings[0] and how in warnings[0]
    manifest = CheckpointStore(fresh / "checkpoints").manifest()
    assert [entry.step for entry in manifest.checkpoints] == [1, 2] and manifest.best == "step-00000001.pt"
    # The run goes on from there, and comes by step 3 again with the very same bytes.
    writer.claim()
    writer.submit(run.folder, run.manifest)
    assert writer.wait(DEADLINE)
    assert whole_latest(bucket, AT).step == 3


def test_the_rest_is_used_where_other_objects_are_damaged(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    upload(mirrors, run, 1, 2, 3)
    latest = whole_latest(bucket, AT)
    bucket.flip(of_step(bucket, 1), 0)
    for file in latest.files:
        if file.name in ("lr_finder.png", "metrics.jsonl"):
            bucket.flip(f"{AT}/{file.key}", 0)
    fresh = tmp_path / "fresh" / "demo"
    assert mirrors().restore(fresh) == 3
    manifest = CheckpointStore(fresh / "checkpoints").manifest()
    assert [entry.step for entry in manifest.checkpoints] == [3] and manifest.best is None
    assert not (fresh / "metrics.jsonl").exists() and (fresh / "recipe.yaml").exists()
    for name in ("step-00000001.pt", "lr_finder.png", "metrics.jsonl"):
        assert len([line for line in mirrors.said if name in line and "warning" in line]) == 1
    for step in (2, 3):
        key = next(f"{AT}/{item.key}" for item in latest.checkpoints if item.step == step)
        bucket.flip(key, 0)
    with pytest.raises(ValueError, match=r"none of the 3 newest checkpoints in .* is whole"):
        mirrors().restore(tmp_path / "another")


def test_it_moves_on_while_it_is_read(bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path) -> None:
    upload(mirrors, run, 1, 2)
    # Its objects are deleted under the reader.
    meanwhile(
        bucket,
        lambda asked: asked.operation == "GetObject" and "step-00000002" in asked.key,
        lambda: upload(mirrors, run, 3, 4, 5, is_best=True),
    )
    fresh = tmp_path / "fresh" / "demo"
    assert mirrors().restore(fresh) == 5
    assert not [line for line in mirrors.said if "warning" in line], "nothing was damaged"
    assert_restored(fresh, run)


def test_without_s3_only_a_fresh_machine_stops(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path
) -> None:
    assert mirrors().restore(tmp_path / "fresh") is None, "there is nothing"
    upload(mirrors, run, 1, 2)
    bucket.server.clear(lambda asked: "503 SlowDown")
    old = FakeRun(tmp_path / "old" / "demo")
    old.save(1)
    assert mirrors().restore(old.folder) is None
    assert "going on from step 1" in mirrors.said[-1]
    with pytest.raises(RuntimeError, match="SlowDown"):
        mirrors().restore(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


HOSTILE: list[tuple[str, Any]] = [
    ("name", "../../evil.pt"),
    ("name", "/etc/evil.pt"),
    ("name", "manifest.json"),
    ("name", "step-00000001.pt/../../../evil"),
    ("key", "../other/run.pt"),
    ("key", "checkpoints/../../other"),
    ("key", "latest.json"),
    ("bytes", 1 << 50),
    ("bytes", -1),
    ("sha256", "0"),
    ("step", -5),
    ("more", 1),
]


def test_a_hostile_listing_is_refused(bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path) -> None:
    upload(mirrors, run, 1)
    good = json.loads(bucket.get(f"{AT}/latest.json"))
    fresh = tmp_path / "a" / "b" / "fresh"
    contents = [json.dumps(good | {"checkpoints": [good["checkpoints"][0] | {k: v}]}) for k, v in HOSTILE]
    contents += [
        json.dumps(good | {"files": [good["files"][0] | {"name": name}]})
        for name in ("status.json", "../x", "checkpoints/manifest.json", ".bashrc")
    ]
    contents += [
        json.dumps(good | {"best": "../best.pt"}),
        json.dumps(good | {"version": 2}),
        json.dumps(good | {"checkpoints": good["checkpoints"] * 2}),
        json.dumps(good | {"checkpoints": good["checkpoints"] * 2_000}),
        json.dumps(good | {"step": 99}),
        "[" * 100_000,
        "junk",
        "",
        json.dumps(good) + " " * (5 * MIB),
    ]
    before = files_of(tmp_path)
    for content in contents:
        bucket.put(f"{AT}/latest.json", content.encode())
        with pytest.raises(ValueError, match=r"latest\.json cannot be used"):
            mirrors().restore(fresh)
    assert files_of(tmp_path) == before
    # A run that has its own checkpoints goes on, and replaces it; what it named may be all there is.
    objects = set(bucket.files(AT))
    assert mirrors().restore(run.folder) is None and "going on from step 1" in mirrors.said[-1]
    upload(mirrors, run, 2)
    assert whole_latest(bucket, AT).step == 2
    assert objects < set(bucket.files(AT))


def test_more_than_the_disk_holds(
    bucket: Bucket, mirrors: Mirrors, run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(mirrors, run, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
    with pytest.raises(RuntimeError, match="free some space"):
        mirrors().restore(tmp_path / "fresh")


# Kills


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


def kill_at(number: int, fault: str) -> Rule:
    count = [0]

    def rule(asked: Asked) -> str | None:
        count[0] += 1
        return fault if count[0] == number else None

    return rule


def kill_saves(bucket: Bucket, nursery: Nursery, tmp_path: Path, fault: str, stride: int) -> None:
    run = FakeRun(tmp_path / "demo")
    location = bucket.at(AT)
    for step in (1, 2):
        run.save(step, is_best=True)
        assert nursery.run(bucket.server, "save", run.folder, location) == 0
    before = expected_of(run)
    number, step, code = 1, 3, -9
    while code == -9:
        run.num_bytes = 6 * MIB if number % 2 else 1000
        run.save(step, is_best=True)
        bucket.server.clear(kill_at(number, fault))
        code = nursery.run(bucket.server, "save", run.folder, location)
        bucket.server.clear()
        whole_latest(bucket, AT)
        fresh = tmp_path / f"fresh-{number}"
        assert CheckpointMirror(location, say=lambda line: None).restore(fresh) is not None
        files = files_of(fresh)
        del files["checkpoints/manifest.json"]
        after = expected_of(run)
        assert files in (before, after), f"killed at request {number}"
        before = files
        number, step = number + stride, step + 1
    assert code == 0 and before == after and number > 15
    run.save(step)
    assert nursery.run(bucket.server, "save", run.folder, location) == 0
    assert_clean(bucket, AT)


def test_killed_in_a_save(bucket: Bucket, nursery: Nursery, tmp_path: Path) -> None:
    kill_saves(bucket, nursery, tmp_path, "kill-after", stride=7)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "kill-after"])
def test_killed_at_every_request_of_a_save(
    bucket: Bucket, nursery: Nursery, tmp_path: Path, fault: str
) -> None:
    kill_saves(bucket, nursery, tmp_path, fault, stride=1)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.long)])
def test_killed_in_a_restore(
    bucket: Bucket, mirrors: Mirrors, nursery: Nursery, tmp_path: Path, stride: int
) -> None:
    run = FakeRun(tmp_path / "demo", num_bytes=6 * MIB)
    upload(mirrors, run, 1, 2, 3)
    number, code = 1, -9
    while code == -9:
        bucket.server.clear(kill_at(number, "kill-after"))
        fresh = tmp_path / f"fresh-{number}"
        code = nursery.run(bucket.server, "restore", fresh, bucket.at(AT))
        bucket.server.clear()
        manifest = CheckpointStore(fresh / "checkpoints").manifest()
        assert all((fresh / "checkpoints" / entry.name).is_file() for entry in manifest.checkpoints)
        if code == -9:
            assert mirrors().restore(fresh) == 3
        assert_restored(fresh, run)
        number += stride
    assert code == 0 and number > 5


@pytest.mark.long
def test_a_stalled_s3_keeps_no_process_alive(bucket: Bucket, run: FakeRun) -> None:
    run.save(1)
    bucket.server.clear(lambda asked: "stall:120")
    code = (
        "from pathlib import Path\n"
        "from train.checkpoint import CheckpointStore\n"
        "from train.checkpoint.mirror import CheckpointMirror\n"
        f"folder = Path({str(run.folder)!r})\n"
        f"mirror = CheckpointMirror({bucket.at(AT)!r})\n"
        "mirror.submit(folder, CheckpointStore(folder / 'checkpoints').manifest())\n"
        "print(mirror.wait(timeout_seconds=0.5))\n"
        "mirror.close()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert (process.returncode, process.stdout) == (0, "False\n"), process.stderr


# python -m train check


def test_a_fault_of_the_mirror_is_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirror_fault(bucket.at("runs")) is None
    assert bucket.files() == {}
    bucket.server.clear(lambda asked: "403 AccessDenied" if asked.operation == "PutObject" else None)
    assert "access denied" in (mirror_fault(bucket.at("runs")) or "")
    assert "no such bucket" in (mirror_fault("s3://another-bucket-of-nobody/runs") or "")
    assert "names no bucket" in (mirror_fault("s3://x/runs") or "")
    monkeypatch.setattr(mirror, "CHECK_SECONDS", 0.2)
    bucket.server.clear(lambda asked: "stall:2")
    assert "does not answer" in (mirror_fault(bucket.at("runs")) or "")


def test_two_nodes_may_look_at_a_mirror_at_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str | None] = []
    real_fetch = s3.fetch

    def fetch(*extra: Any, **where: Any) -> Any:
        if mirror.CHECK_NAME in where["Key"] and not others:  # between the writing and the reading back
            others.append("not ended")
            others[0] = mirror_fault(bucket.at("runs"))
        return real_fetch(*extra, **where)

    monkeypatch.setattr(s3, "fetch", fetch)
    assert mirror_fault(bucket.at("runs")) is None
    assert others == [None]
    assert bucket.files() == {}
