"""`prepare` and `verify` on S3: the same bytes as on a disk, whatever the network does and whoever dies."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.manifest import load_index, load_manifest
from tests.integration.s3_server import Asked, Bucket, FaultyS3, Rule
from tests.integration.s3_sets import FORMATS, NoiseSets, data_prep, local_files, prepare_words
from tests.unit.data_prep.test_layouts import hub, ilsvrc, image, write, zip_of

IMAGES = {
    f"{split}/{name}/{number} of 100%+é.jpg": image(seed)
    for split in ("train", "val")
    for seed, name in enumerate(("a cat", "dog+ü", "x%20y&z=1"))
    for number in range(4)
}
STORM = ("503 SlowDown", "500 InternalError", "drop", "drop-answer", "drop-upload", "drop-half")
WRITES = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "DeleteObject")


def assert_whole(bucket: Bucket, prefix: str, expected: dict[str, bytes]) -> None:
    """Nothing but the data set is there, and it is the one that a disk would hold."""
    found = bucket.files(prefix + "/")
    assert sorted(found) == sorted(expected), "no lock, no journal, nothing missing"
    assert [name for name, content in expected.items() if found[name] != content] == []
    assert bucket.uploads() == [], "they cost storage"


def written(server: FaultyS3) -> list[str]:
    """Keys of what was stored, the lock apart."""
    return [asked.key for asked in server.all("PutObject", "UploadPart") if not asked.key.endswith(".lock")]


@pytest.mark.parametrize("format", FORMATS)
def test_same_bytes_as_on_a_disk(bucket: Bucket, noise_sets: NoiseSets, format: str) -> None:
    neighbours = {"deep/set-2/train.beton": b"x", "deep/settle": b"y", "train.beton": b"z"}
    for key, content in neighbours.items():
        bucket.put(key, content)
    words = prepare_words(noise_sets, format, bucket.at("deep/set/"))
    outcome = data_prep(*words)
    assert outcome.code == 0, outcome.errors
    assert "79 found = 78 prepared + 1 quarantined" in outcome.out
    assert f"prepared 72 train, 6 val images in {bucket.at('deep/set/')}" in outcome.out
    assert_whole(bucket, "deep/set", noise_sets.files(format))
    assert {key: bucket.get(key) for key in neighbours} == neighbours
    listed = [asked.query["prefix"] for asked in bucket.server.all("ListObjectsV2", "ListMultipartUploads")]
    assert listed and all(prefix.startswith("deep/set/") for prefix in listed)
    puts = bucket.server.all("PutObject", "UploadPart", "CompleteMultipartUpload")
    keys = [put.key for put in puts if not put.key.endswith(".lock")]
    assert keys.index("deep/set/manifest.json") == len(keys) - 1, "once, when all else is there"
    order = [(put.key.rsplit("/", 1)[-1], put.query.get("partNumber")) for put in puts]
    for split, number in recorded_in(keys):
        data = (
            (f"{split}.beton", str(number + 1)) if format == "ffcv" else (f"{split}-{number:05d}.idx", None)
        )
        assert order.index(data) < order.index((f"{split}-{number:06d}.json", None)), "a record comes after"

    bucket.server.clear()
    assert data_prep(*words).code == 0 and written(bucket.server) == [], "it is there already"
    outcome = data_prep("verify", bucket.at("deep/set"))
    assert outcome.code == 0 and "is whole: 72 train, 6 val images" in outcome.out, outcome.errors


@pytest.mark.parametrize("kind", ["folder", "zip", "ilsvrc", "parquet"])
def test_sources_in_s3(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    source, where = tmp_path / "source", "my source"
    write(source, {"folder": IMAGES, "zip": {}, "ilsvrc": ilsvrc(), "parquet": hub()}[kind])
    if kind == "zip":
        source.mkdir()
        zip_of(source / "all of it.zip", IMAGES)
    bucket.put_folder(where, source)
    if kind == "zip":
        source, where = source / "all of it.zip", "my source/all of it.zip"
    bucket.put("my source-2/train/a/0.jpg", b"of somebody else")
    bucket.server.rule = storm(7, 0.05)
    format = "dali" if kind in ("zip", "parquet") else "ffcv"
    outs = tmp_path / "here", tmp_path / "there"
    for place, out in zip((source, bucket.at(where)), outs, strict=True):
        words = ["prepare", "--source", place, "--out", out, "--format", format, "--max-bad-fraction", 0]
        outcome = data_prep(*words)
        assert outcome.code == 0, outcome.errors
    here, there = (local_files(out) for out in outs)
    manifests = [load_manifest(out) for out in outs]
    same = {"source_fingerprint": "", "layout": manifests[0].layout}
    assert manifests[0].model_copy(update=same) == manifests[1].model_copy(update={"source_fingerprint": ""})
    del here["manifest.json"], there["manifest.json"]
    assert here == there
    assert len(bucket.server.all("GetObject")) > 5


def storm(seed: int, probability: float) -> Rule:
    """Any request may meet any fault; and those that are done twice are done twice."""
    chance = random.Random(seed)

    def rule(asked: Asked) -> str | None:
        if asked.nth == 1 and asked.operation in WRITES:
            return "drop-answer"
        if (asked.operation, asked.nth) == ("GetObject", 2):
            return "drop-half"
        return chance.choice(STORM) if chance.random() < probability else None

    return rule


@pytest.mark.parametrize(
    ("format", "seed"),
    [
        ("ffcv", 0),
        ("dali", 1),
        *(pytest.param(f, s, marks=pytest.mark.long) for s in range(2, 12) for f in FORMATS),
    ],
)
@pytest.mark.long
def test_a_storm_passes(bucket: Bucket, noise_sets: NoiseSets, format: str, seed: int) -> None:
    bucket.server.rule = storm(seed, 0.25)
    outcome = data_prep(*prepare_words(noise_sets, format, bucket.at("set")))
    assert outcome.code == 0, outcome.errors
    bucket.server.clear()
    assert_whole(bucket, "set", noise_sets.files(format))
    bucket.server.rule = storm(seed, 0.2)
    outcome = data_prep("verify", bucket.at("set"), "--no-decode", "--sample", 5)
    assert outcome.code == 0, outcome.errors


def test_stalls_pass(bucket: Bucket, noise_sets: NoiseSets) -> None:
    stalled = {("UploadPart", 2), ("GetObject", 3), ("CompleteMultipartUpload", 1)}
    bucket.server.rule = lambda asked: "stall:3" if (asked.operation, asked.nth) in stalled else None
    words = prepare_words(noise_sets, "ffcv", bucket.at("set"))
    outcome = data_prep(*words, S3_TIMEOUT_SECONDS="0.5")
    assert outcome.code == 0, outcome.errors
    assert {asked.fault for asked in bucket.server.asked} == {"", "stall:3"}
    assert_whole(bucket, "set", noise_sets.files("ffcv"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.long
def test_an_outage_ends_in_a_sentence_and_the_next_start_goes_on(
    bucket: Bucket, noise_sets: NoiseSets, format: str
) -> None:
    words = prepare_words(noise_sets, format, bucket.at("set"))
    down = {"since": False}

    def outage(asked: Asked) -> str | None:
        down["since"] = down["since"] or (asked.operation, asked.nth) == ("UploadPart", 4)
        return "503 SlowDown" if down["since"] else None

    bucket.server.rule = outage
    outcome = data_prep(*words, S3_MAX_ATTEMPTS="2")
    outcome.assert_sentence("failed 2 times (SlowDown): run the same command again to go on from here")
    assert "set/manifest.json" not in bucket.files()
    kept = recorded(bucket, "set")
    assert kept
    bucket.server.clear()
    outcome = data_prep(*words)
    assert outcome.code == 0 and "kept from the interrupted run" in outcome.errors, outcome.errors
    assert_whole(bucket, "set", noise_sets.files(format))
    assert not kept & stored(bucket.server)


def recorded(bucket: Bucket, prefix: str) -> set[tuple[str, int]]:
    """(split, piece or shard) of what the journal says is finished."""
    return recorded_in(bucket.files(prefix + "/"))


def recorded_in(keys: Iterable[str]) -> set[tuple[str, int]]:
    names = (re.search(r"\.prepare/(train|val)-(\d+)\.json$", key) for key in keys)
    return {(match[1], int(match[2])) for match in names if match}


def stored(server: FaultyS3) -> set[tuple[str, int]]:
    """The same, of what was uploaded."""
    pieces = set()
    for asked in server.all("UploadPart"):
        name = asked.key.rsplit("/", 1)[-1]
        if name.endswith(".beton"):
            pieces.add((name.removesuffix(".beton"), int(asked.query["partNumber"]) - 1))
        else:
            split, _, number = name.removesuffix(".tar").partition("-")
            pieces.add((split, int(number)))
    return pieces


KILLS = [
    ("ffcv", "UploadPart", 3, "kill-after"),
    ("ffcv", "CompleteMultipartUpload", 1, "kill-after"),
    ("dali", "UploadPart", 3, "kill-after"),
    ("dali", "PutObject", 7, "kill"),
]
MORE_KILLS = [
    (format, operation, nth, kill)
    for format, *counts in (("ffcv", 7, 10, 2), ("dali", 4, 16, 4))
    for operation, count in zip(("UploadPart", "PutObject", "CompleteMultipartUpload"), counts, strict=True)
    for nth in range(1, count + 1)
    for kill in ("kill", "kill-after")
]


@pytest.mark.parametrize(
    ("format", "operation", "nth", "kill"),
    [*KILLS, *(pytest.param(*moment, marks=pytest.mark.long) for moment in MORE_KILLS)],
)
@pytest.mark.long
def test_killed_while_uploading(
    bucket: Bucket, noise_sets: NoiseSets, format: str, operation: str, nth: int, kill: str
) -> None:
    words = prepare_words(noise_sets, format, bucket.at("set"))
    bucket.server.rule = lambda asked: kill if (asked.operation, asked.nth) == (operation, nth) else None
    assert data_prep(*words, server=bucket.server).code == -9
    left = bucket.files("set/")
    assert "manifest.json" not in left or operation == "PutObject"
    kept = recorded(bucket, "set")
    bucket.server.clear()
    outcome = data_prep(*words)
    assert outcome.code == 0, outcome.errors
    assert_whole(bucket, "set", noise_sets.files(format))
    if "manifest.json" not in left:
        # The record of a .beton's last pieces counts only once the file has its name.
        whole = {f"{split}.beton" for split in ("train", "val")} & set(left)
        tails = {(split, max(n for s, n in kept if s == split)) for split, _ in kept}
        if format == "ffcv":
            kept -= {tail for tail in tails if f"{tail[0]}.beton" not in whole}
        assert not kept & stored(bucket.server)
        for name in whole:
            assert not [asked for asked in bucket.server.all("UploadPart") if asked.key.endswith(name)]


@pytest.mark.long
def test_what_a_killed_start_with_other_settings_left(bucket: Bucket, noise_sets: NoiseSets) -> None:
    bucket.server.rule = lambda asked: "kill" if (asked.operation, asked.nth) == ("UploadPart", 2) else None
    outcome = data_prep(*prepare_words(noise_sets, "dali", bucket.at("set")), server=bucket.server)
    assert outcome.code == -9 and bucket.uploads() == ["set/train-00001.tar"]
    bucket.server.clear()
    bucket.s3.create_multipart_upload(Bucket=bucket.name, Key="set/somebody-else")
    outcome = data_prep(*prepare_words(noise_sets, "ffcv", bucket.at("set")))
    assert outcome.code == 0, outcome.errors
    assert bucket.uploads() == ["set/somebody-else"]
    bucket.s3.abort_multipart_upload(
        Bucket=bucket.name,
        Key="set/somebody-else",
        UploadId=bucket.s3.list_multipart_uploads(Bucket=bucket.name)["Uploads"][0]["UploadId"],
    )
    assert_whole(bucket, "set", noise_sets.files("ffcv"))


@pytest.mark.parametrize(
    ("format", "fault"),
    [
        ("ffcv", "flip-upload"),
        ("dali", "flip-download"),
        pytest.param("dali", "flip-upload", marks=pytest.mark.long),
    ],
)
def test_a_wrong_byte_is_noticed(bucket: Bucket, noise_sets: NoiseSets, format: str, fault: str) -> None:
    words = prepare_words(noise_sets, format, bucket.at("set"))

    def rule(asked: Asked) -> str | None:
        if fault == "flip-upload":
            return fault if (asked.operation, asked.nth) == ("UploadPart", 2) else None
        shard = asked.key.endswith((".beton", ".tar")) and asked.operation == "GetObject"
        return fault if shard and "flip-download" not in {a.fault for a in bucket.server.asked} else None

    bucket.server.rule = rule
    outcome = data_prep(*words)
    outcome.assert_sentence("came back with other bytes than were written")
    assert "set/manifest.json" not in bucket.files()
    bucket.server.clear()
    outcome = data_prep(*words)
    assert outcome.code == 0, outcome.errors
    assert_whole(bucket, "set", noise_sets.files(format))


def test_a_wrong_byte_in_a_small_file_is_mended(bucket: Bucket, noise_sets: NoiseSets) -> None:
    done: set[str] = set()

    def rule(asked: Asked) -> str | None:
        name = asked.key.rsplit("/", 1)[-1]
        if asked.operation != "PutObject" or name == ".lock" or name in done or not name:
            return None
        done.add(name)
        return "flip-upload" if name != "quarantine.jsonl" else "drop-answer"

    bucket.server.rule = rule
    outcome = data_prep(*prepare_words(noise_sets, "dali", bucket.at("set")))
    assert outcome.code == 0, outcome.errors
    assert {"manifest.json", "train.index.npy", "train-00000.idx", "train-000000.json"} <= done
    assert_whole(bucket, "set", noise_sets.files("dali"))


@pytest.mark.parametrize("format", FORMATS)
def test_verify_names_a_damaged_sample_in_s3(bucket: Bucket, noise_sets: NoiseSets, format: str) -> None:
    folder = noise_sets.folder(format)
    bucket.put_folder("set", folder)
    manifest = load_manifest(folder)
    index = load_index(folder, manifest, "train")
    shard = manifest.splits["train"].shards[index["shard"][41]]
    bucket.flip(f"set/{shard.name}", int(index["offset"][41]) + 1000)
    for words in (["--sample", 3, "--seed", seed_without(41, len(index))], []):
        outcome = data_prep("verify", bucket.at("set"), *words)
        assert outcome.code == 1 and "Traceback" not in outcome.errors
        sentence = f"{bucket.at('set')}/{shard.name} is not the file that was prepared (its SHA-256 differs)"
        assert sentence in outcome.errors
        assert ("sample 41 of split train is damaged (its CRC-32C differs)" in outcome.errors) == (not words)


def seed_without(sample: int, count: int) -> int:
    """A seed with which `--sample 3` looks at other samples."""
    return next(s for s in range(99) if sample not in np.random.default_rng(s).choice(count, 3, False))


def test_refusals_are_one_sentence_each(
    bucket: Bucket, noise_sets: NoiseSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = prepare_words(noise_sets, "dali", "s3://no-such-bucket-here/set")
    data_prep(*words).assert_sentence("there is no such bucket; make it, or check its name")
    words = prepare_words(noise_sets, "dali", bucket.at("set"))
    bucket.server.rule = lambda asked: "403 AccessDenied"
    data_prep(*words).assert_sentence("access denied (AccessDenied): check the credentials' rights")
    assert len(bucket.server.asked) <= 3, "a refusal is not tried again"
    bucket.server.clear(lambda asked: "400 ExpiredToken")
    data_prep(*words).assert_sentence("the credentials have expired (ExpiredToken): log in again")
    bucket.server.clear()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    data_prep("verify", bucket.at("set")).assert_sentence("no AWS credentials were found")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    data_prep("verify", bucket.at("set")).assert_sentence("profile (nobody) could not be found")
    assert bucket.files() == {} and bucket.server.asked == []


def test_a_source_that_fails_for_good_is_no_quarantine(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put_folder("source", write(tmp_path / "source", IMAGES))

    def rule(asked: Asked) -> str | None:
        return "503 SlowDown" if asked.operation == "GetObject" and "dog" in asked.key else None

    bucket.server.rule = rule
    words = ["prepare", "--source", bucket.at("source"), "--out", tmp_path / "out", "--max-bad-fraction", 1]
    data_prep(*words, S3_MAX_ATTEMPTS="2").assert_sentence("failed 2 times (SlowDown)")
    assert not (tmp_path / "out" / "manifest.json").exists()
    bucket.server.clear()
    outcome: Any = data_prep(*words)
    assert outcome.code == 0 and "24 found = 24 prepared + 0 quarantined" in outcome.out


@pytest.mark.long
def test_stats_says_the_same_of_a_set_in_s3(bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path) -> None:
    bucket.put_folder("set", noise_sets.folder("dali"))
    bucket.server.rule = storm(3, 0.1)
    reports = {}
    for name, location in (("here", str(noise_sets.folder("dali"))), ("there", bucket.at("set"))):
        outcome = data_prep("stats", location, "--out", tmp_path / name, "--audit", "--workers", 1)
        assert outcome.code == 0, outcome.errors
        report = (tmp_path / name / "audit.json").read_text()
        reports[name] = report.replace(location, "LOCATION"), (tmp_path / name / "audit.csv").read_bytes()
        assert location in (tmp_path / name / "data_card.html").read_text()
    assert reports["here"] == reports["there"]
    assert all(asked.operation in ("GetObject", "HeadObject") for asked in bucket.server.asked)
