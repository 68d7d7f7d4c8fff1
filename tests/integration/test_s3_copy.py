"""`copy` between disks and S3: the same bytes, resumed after a kill, never a wrong byte, refusals by name."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep import __main__, copying, storage
from tests.integration.s3_server import Asked, Bucket
from tests.integration.s3_sets import NoiseSets, data_prep, local_files

PIECE = 5 << 20  # the least that S3 takes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", PIECE)


@pytest.fixture
def copy(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process (it has no workers); returns exit code, output, errors."""

    def run(source: object, target: object, connections: int = 4) -> tuple[int, str, str]:
        capfd.readouterr()
        words = ["copy", str(source), str(target), "--connections", str(connections)]
        return __main__.main(words), *capfd.readouterr()

    return run


def places(kind: str, bucket: Bucket, sets: NoiseSets, root: Path) -> tuple[str, str]:
    """Source, with the ffcv set in it, and target of a copy such as "disk to s3"."""
    source, target = kind.split(" to ")
    if source == "s3":
        bucket.put_folder("source", sets.folder("ffcv"))
        bucket.server.clear()
    return (
        bucket.at("source") if source == "s3" else str(sets.folder("ffcv")),
        bucket.at("a target+") if target == "s3" else str(root / "target"),
    )


def held(target: str, bucket: Bucket) -> dict[str, bytes]:
    return bucket.files("a target+/") if target.startswith("s3") else local_files(Path(target))


KINDS = ["disk to disk", "disk to s3", "s3 to disk", "s3 to s3"]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_hold_the_same_bytes(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, kind: str
) -> None:
    expected = noise_sets.files("ffcv")
    source, target = places(kind, bucket, noise_sets, tmp_path)
    code, out, errors = copy(source, target)
    assert code == 0, errors
    assert held(target, bucket) == expected and bucket.uploads() == []
    num_bytes = sum(map(len, expected.values())) / 1e6
    figures = re.search(r"copied ([\d,.]+) MB in [\d.]+ s \([\d,]+ MB/s\), 0.0 MB were there already", out)
    assert figures and abs(float(figures[1]) - num_bytes) < 0.2, out
    assert re.search(r"copy: .* of .*B/s", errors), errors
    if target.startswith("s3"):
        puts = bucket.server.all("PutObject", "CompleteMultipartUpload")
        assert [put.key for put in puts if "." not in put.key.rsplit("/")[-1][:1]][
            -1
        ] == "a target+/manifest.json"
    if kind == "s3 to s3":
        assert len(bucket.server.all("UploadPartCopy")) > 4
        assert bucket.server.uploaded(".beton") == 0, "S3 copies by itself"
    bucket.server.clear()
    code, out, _ = copy(source, target)
    assert code == 0 and "copied 0.0 MB" in out
    assert not bucket.server.all("UploadPart", "UploadPartCopy", "CreateMultipartUpload")
    assert held(target, bucket) == expected


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 8))])
@pytest.mark.long
def test_a_storm_passes(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, kind: str, seed: int
) -> None:
    from tests.integration.test_s3_prepare import storm

    source, target = places(kind, bucket, noise_sets, tmp_path)
    bucket.server.rule = storm(seed, 0.25)
    code, _, errors = copy(source, target)
    assert code == 0, errors
    assert held(target, bucket) == noise_sets.files("ffcv") and bucket.uploads() == []


@pytest.mark.parametrize(
    ("kind", "operation", "nth"),
    [
        ("disk to s3", "UploadPart", 4),
        ("s3 to disk", "GetObject", 9),
        ("s3 to s3", "UploadPartCopy", 4),
        pytest.param("disk to s3", "CompleteMultipartUpload", 1, marks=pytest.mark.long),
        pytest.param("disk to s3", "UploadPart", 1, marks=pytest.mark.long),
        pytest.param("disk to s3", "PutObject", 4, marks=pytest.mark.long),
        pytest.param("s3 to s3", "CompleteMultipartUpload", 2, marks=pytest.mark.long),
    ],
)
def test_killed_and_started_again(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, kind: str, operation: str, nth: int
) -> None:
    source, target = places(kind, bucket, noise_sets, tmp_path)
    bucket.server.rule = lambda asked: "kill" if (asked.operation, asked.nth) == (operation, nth) else None
    # The command as a user starts it, but with small pieces.
    code = f"import sys; from data_prep import __main__, copying; copying.PIECE_BYTES = {PIECE}; "
    code += "sys.exit(__main__.main(sys.argv[1:]))"
    words = ["copy", source, target, "--connections", 1]
    assert data_prep(*words, server=bucket.server, code=code).code == -9
    assert "manifest.json" not in held(target, bucket)
    before = done(bucket, kind)
    bucket.server.clear()
    exit_code, out, errors = copy(source, target)
    assert exit_code == 0, errors
    assert held(target, bucket) == noise_sets.files("ffcv") and bucket.uploads() == []
    again = done(bucket, kind)
    assert not before & again, "what had come is not transferred again"
    if operation != "PutObject" and (operation, nth) != ("UploadPart", 1):
        assert before
        kept = float(re.search(r"([\d.,]+) MB were there already", out)[1])  # type: ignore[index]
        assert kept >= PIECE / 1e6


def done(bucket: Bucket, kind: str) -> set[tuple[str, str]]:
    """(file, part) of the shards that went through whole."""
    if kind == "s3 to disk":
        # The last answer may not have reached the disk when its receiver was killed.
        gets = [
            get for get in bucket.server.all("GetObject") if get.key.endswith(".beton") and get.status == 206
        ]
        return {(get.key, get.range) for get in gets[:-1] if get.key.startswith("source/train")}
    puts = bucket.server.all("UploadPart", "UploadPartCopy")
    return {(put.key, put.query["partNumber"]) for put in puts if put.status == 200}


@pytest.mark.parametrize("kind", ["disk to s3", "s3 to disk"])
def test_a_wrong_byte_on_the_way_is_mended(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, kind: str
) -> None:
    source, target = places(kind, bucket, noise_sets, tmp_path)
    flipped: list[str] = []

    def rule(asked: Asked) -> str | None:
        download = asked.operation == "GetObject" and "source" in asked.key
        if flipped or not (
            asked.key.endswith("train.beton") and (download or asked.operation == "UploadPart")
        ):
            return None
        flipped.append(asked.key)
        return "flip-download" if download else "flip-upload"

    bucket.server.rule = rule
    code, _, errors = copy(source, target)
    assert code == 0 and flipped
    assert "train.beton arrived with other bytes: copying it again" in errors
    assert held(target, bucket) == noise_sets.files("ffcv") and bucket.uploads() == []


@pytest.mark.parametrize("name", ["manifest.json", "quarantine.jsonl"])
def test_a_wrong_byte_in_a_file_without_a_checksum(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, name: str
) -> None:
    """Of two readings that differ neither is believed; on the way up it is read back."""
    bucket.put_folder("source", noise_sets.folder("ffcv"))
    for source, target in (
        (bucket.at("source"), tmp_path / "t"),
        (noise_sets.folder("ffcv"), bucket.at("t")),
    ):
        operation = "GetObject" if str(source).startswith("s3") else "PutObject"
        seen: list[str] = []

        def rule(asked: Asked, operation: str = operation, seen: list[str] = seen) -> str | None:
            if not asked.key.endswith(name) or asked.operation != operation:
                return None
            seen.append(asked.key)
            fault = "flip-download" if operation == "GetObject" else "flip-upload"
            # The first reading of a manifest with a wrong byte may be no JSON any more.
            return fault if len(seen) == (2 if operation == "GetObject" else 1) else None

        bucket.server.clear(rule)
        code, _, errors = copy(source, target)
        assert code == 0, errors
        assert seen
    assert local_files(tmp_path / "t") == bucket.files("t/") == noise_sets.files("ffcv")


def test_a_way_that_is_always_wrong_is_given_up(bucket: Bucket, noise_sets: NoiseSets, copy: Any) -> None:
    def rule(asked: Asked) -> str | None:
        wrong = asked.operation == "UploadPart" and asked.key.endswith("val.beton")
        return "flip-upload" if wrong else None

    bucket.server.rule = rule
    code, _, errors = copy(noise_sets.folder("ffcv"), bucket.at("t"))
    assert code == 1 and "val.beton came back wrong 3 times: check that disk or network" in errors
    assert not {"manifest.json", "val.beton"} & set(bucket.files("t/")) and bucket.uploads() == []


@pytest.mark.parametrize("kind", ["disk to s3", "s3 to disk", "s3 to s3"])
def test_a_damaged_source_is_refused_by_name(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, copy: Any, kind: str
) -> None:
    folder = Path(shutil.copytree(noise_sets.folder("ffcv"), tmp_path / "folder"))
    content = bytearray((folder / "train.beton").read_bytes())
    content[9_000_000] ^= 1
    (folder / "train.beton").write_bytes(content)
    bucket.put_folder("source", folder)
    source = bucket.at("source") if kind.startswith("s3") else str(folder)
    target = bucket.at("a target+") if kind.endswith("s3") else str(tmp_path / "target")
    code, _, errors = copy(source, target)
    assert code == 1 and f"error: {source}/train.beton is damaged (its SHA-256 differs)" in errors
    assert not {"train.beton", "manifest.json"} & set(held(target, bucket))
    for name, change in (("val.beton", b"short"), ("train.index.npy", None), ("quarantine.jsonl", None)):
        shutil.rmtree(folder)
        shutil.copytree(noise_sets.folder("ffcv"), folder)
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change)
        what = "is missing" if change is None else "has 5 bytes instead of"
        code, _, errors = copy(folder, tmp_path / name)
        assert code == 1 and f"{folder}/{name} {what}" in errors
        assert not (tmp_path / name / "manifest.json").exists()


def test_a_target_with_another_data_set_is_left_alone(
    bucket: Bucket, noise_sets: NoiseSets, copy: Any
) -> None:
    bucket.put_folder("t", noise_sets.folder("dali"))
    code, _, errors = copy(noise_sets.folder("ffcv"), bucket.at("t"))
    assert code == 1 and f"error: {bucket.at('t')} already holds another data set: choose another" in errors
    assert bucket.files("t/") == noise_sets.files("dali")
    code, _, errors = copy(bucket.at("empty"), bucket.at("u"))
    assert code == 1 and f"{bucket.at('empty')} holds no manifest.json" in errors
    assert bucket.files("u/") == {}


def test_refusals_are_one_sentence_each(
    bucket: Bucket, noise_sets: NoiseSets, copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep import s3_requests

    code, _, errors = copy(noise_sets.folder("ffcv"), "s3://no-such-bucket-here/x")
    assert code == 1 and "there is no such bucket" in errors
    bucket.server.rule = lambda asked: "403 AccessDenied"
    code, _, errors = copy(noise_sets.folder("ffcv"), bucket.at("x"))
    assert code == 1 and errors.count("error: ") == 1 and "access denied" in errors
    monkeypatch.setattr(s3_requests, "MAX_ATTEMPTS", 2)
    bucket.server.rule = lambda asked: "503 SlowDown" if asked.operation == "UploadPart" else None
    code, _, errors = copy(noise_sets.folder("ffcv"), bucket.at("x"))
    assert code == 1 and "failed 2 times (SlowDown): run the same command again" in errors
    bucket.server.clear()
    assert copy(noise_sets.folder("ffcv"), bucket.at("x"))[0] == 0
    assert bucket.files("x/") == noise_sets.files("ffcv") and bucket.uploads() == []


@pytest.mark.parametrize("kind", ["disk to disk", "s3 to disk"])
def test_a_full_disk(
    bucket: Bucket,
    noise_sets: NoiseSets,
    tmp_path: Path,
    copy: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(storage, "DISK_FULL_WAITS", (0.01, 0.01))
    source, target = places(kind, bucket, noise_sets, tmp_path)
    pwrite, left = os.pwrite, [4]

    def full(file: int, content: Any, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return pwrite(file, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        code, _, errors = copy(source, target, connections=1)
    assert code == 1 and "error: the disk is full: free some space and run the same command again" in errors
    assert "the disk is full; trying again in 0 s" in errors and "Traceback" not in errors
    bucket.server.clear()
    code, out, _ = copy(source, target)
    assert code == 0 and "0.0 MB were there already" not in out, "what had come is kept"
    assert held(target, bucket) == noise_sets.files("ffcv")
