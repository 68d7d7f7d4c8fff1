"""The S3 folder by itself: strange keys, long lists, requests repeated after their success, the lock."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from data_prep import s3_lock, s3_requests
from data_prep.s3 import S3Folder
from data_prep.storage import open_folder, read_range
from tests.integration.s3_server import SECRET, Asked, Bucket
from tests.integration.s3_sets import NoiseSets, data_prep, prepare_words

NAMES = [
    "a b.txt",
    "a+b",
    "100%",
    "%41",
    "é/ü ß.jpg",
    "x?y=1&z#w",
    "日本/語",
    "q'uo\"te",
    "t~;:@,$!*()",
]
MIB = 1 << 20


@pytest.fixture
def folder(bucket: Bucket) -> S3Folder:
    opened = open_folder(bucket.at("deep er/set+1%/"))
    assert isinstance(opened, S3Folder)
    return opened


def first(operation: str, fault: str, nth: int = 1) -> Callable[[Asked], str | None]:
    return lambda asked: fault if (asked.operation, asked.nth) == (operation, nth) else None


def test_strange_names(bucket: Bucket, folder: S3Folder) -> None:
    contents = {name: name.encode() * 3 for name in NAMES}
    for name, content in contents.items():
        folder.write(name, content)
    assert [file.name for file in folder.files()] == sorted(NAMES)
    assert [file.name for file in folder.children()] == sorted(name for name in NAMES if "/" not in name)
    assert [file.name for file in folder.files("é")] == ["é/ü ß.jpg"]
    assert bucket.files("deep er/set+1%/") == contents
    for name, content in contents.items():
        info = folder.info(name)
        assert info is not None and info.num_bytes == len(content)
        assert folder.read(name, 1, 3) == read_range(folder.path_of(name), 1, 3) == content[1:4]
        copied = folder.create(f"copy of {name}", 5 * MIB)
        copied.copy_from(0, folder.bucket, folder.prefix + name, 0, len(content))  # type: ignore[attr-defined]
        copied.finish(1, len(content))
        assert folder.read(f"copy of {name}") == content
        folder.delete(name)
        folder.delete(name)
        assert folder.info(name) is None
        with pytest.raises(FileNotFoundError):
            folder.read(name)


def test_ranges_and_empty_objects(folder: S3Folder) -> None:
    folder.write("empty", b"")
    folder.write("ten", b"0123456789")
    assert folder.read("empty") == folder.read("empty", 0, 5) == folder.read("ten", 10, 5) == b""
    assert folder.read("ten", 3) == b"3456789" and folder.read("ten", 8, 5) == b"89"
    assert folder.read("ten", 4, 0) == b""
    file = folder.create("empty in pieces", 5 * MIB)
    file.put(0, b"")
    file.finish(1, 0)
    assert folder.read("empty in pieces") == b""


def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"ListObjectsV2": "MaxKeys", "ListParts": "MaxParts", "ListMultipartUploads": "MaxUploads"}
    for operation, limit in limits.items():

        def shorten(params: dict[str, Any], limit: str = limit, **rest: Any) -> None:
            params[limit] = 2

        s3_requests.client().meta.events.register_first(f"before-parameter-build.s3.{operation}", shorten)


def test_lists_of_several_pages(bucket: Bucket, folder: S3Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    short_pages(monkeypatch)
    for name in NAMES:
        folder.write(name, b"x")
    bucket.server.clear(lambda asked: "500 InternalError" if asked.nth % 2 else None)
    assert [file.name for file in folder.files()] == sorted(NAMES)
    asked = bucket.server.all("ListObjectsV2")
    assert len(asked) == 10, "five pages, each once in vain: a fault does not begin it anew"
    bucket.server.clear()
    tokens = [folder.create("x", 5 * MIB).token for _ in range(5)]
    folder.create("x.y", 5 * MIB)
    assert sorted(folder.unfinished("x")) == sorted(("x", token) for token in tokens)
    folder.abort_unfinished("x", keep=tokens[3])
    assert folder.unfinished() == [("x", tokens[3]), ("x.y", folder.unfinished("x.y")[0][1])]
    file = folder.create("x", 5 * MIB, tokens[3])
    for number in range(5):
        file.put(number, bytes([number]))
    again = folder.create("x", 5 * MIB, tokens[3])
    assert again.durable_pieces() == set(range(5))


@pytest.mark.long
def test_a_list_beyond_a_thousand(bucket: Bucket, folder: S3Folder) -> None:
    for number in range(2_100):
        bucket.put(f"{folder.prefix}{number:05d}", b"")
    assert [file.name for file in folder.files()] == [f"{number:05d}" for number in range(2_100)]


def in_pieces(folder: S3Folder, content: bytes, piece_bytes: int = 5 * MIB) -> None:
    file = folder.create("x", piece_bytes)
    pieces = [content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes)]
    for number, piece in reversed(list(enumerate(pieces))):
        file.put(number, piece)
    file.finish(len(pieces), len(content))


@pytest.mark.parametrize(
    "operation",
    ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "PutObject", "DeleteObject"],
)
@pytest.mark.parametrize("fault", ["drop-answer", "drop-upload", "503 SlowDown", "429 Throttled"])
@pytest.mark.long
def test_done_twice_is_done_once(bucket: Bucket, folder: S3Folder, operation: str, fault: str) -> None:
    content = random.Random(1).randbytes(6 * MIB)
    bucket.server.rule = first(operation, fault)
    in_pieces(folder, content)
    folder.write("y", b"small")
    folder.write("z", b"")
    folder.delete("z")
    assert fault in {asked.fault for asked in bucket.server.all(operation)}
    assert bucket.files(folder.prefix) == {"x": content, "y": b"small"}
    assert bucket.uploads() == []


def test_finishing_again_what_is_finished(bucket: Bucket, folder: S3Folder) -> None:
    """S3 forgets a finished upload sooner or later; moto does not."""
    faults = {1: "drop-answer", 2: "404 NoSuchUpload"}
    bucket.server.rule = lambda asked: (
        faults.get(asked.nth) if asked.operation == "CompleteMultipartUpload" else None
    )
    in_pieces(folder, b"content")
    assert folder.read("x") == b"content" and len(bucket.server.all("CompleteMultipartUpload")) == 2


def test_an_upload_that_somebody_removed(bucket: Bucket, folder: S3Folder) -> None:
    folder.write("x", b"another one of that name")
    file = folder.create("x", 5 * MIB)
    file.put(0, b"content")
    folder.abort_unfinished("x")
    # moto answers 500 instead.
    bucket.server.rule = lambda asked: (
        "404 NoSuchUpload" if asked.operation in ("UploadPart", "CompleteMultipartUpload") else None
    )
    for action in (lambda: file.put(1, b"more"), lambda: file.finish(1, 7)):
        with pytest.raises(RuntimeError, match=r"was removed meanwhile, by a rule of the bucket .* run the"):
            action()
    with pytest.raises(FileNotFoundError):
        file.durable_pieces()
    file.abort()
    assert folder.read("x") == b"another one of that name"


def test_a_body_that_breaks_off_or_changes(bucket: Bucket, folder: S3Folder) -> None:
    content = random.Random(2).randbytes(100_000)
    folder.write("x", content)
    for fault in ("drop-half", "drop", "drop-answer", "flip-download"):
        bucket.server.clear(first("GetObject", fault))
        assert folder.read("x") == content, "S3's own checksum of a whole object is compared"
        assert len(bucket.server.all("GetObject")) == 2
    bucket.server.clear(lambda asked: "drop-half")
    s3_requests.MAX_ATTEMPTS, before = 3, s3_requests.MAX_ATTEMPTS
    try:
        with pytest.raises(RuntimeError, match=r"reading s3://.*/x failed 3 times \(\w+\): run the same"):
            folder.read("x")
    finally:
        s3_requests.MAX_ATTEMPTS = before


# --- the lock ---


def lock_of(folder: S3Folder) -> s3_lock.LockObject:
    return s3_lock.LockObject(folder.location, folder.bucket, folder.prefix + s3_lock.LOCK_NAME)


def test_two_writers(bucket: Bucket, folder: S3Folder, noise_sets: NoiseSets) -> None:
    with folder.lock() as still_ours:
        with (
            pytest.raises(RuntimeError, match=rf"pid {os.getpid()}, last sign of life \d+ s ago"),
            folder.lock(),
        ):
            pass
        outcome = data_prep(*prepare_words(noise_sets, "dali", folder.location))
        outcome.assert_sentence(
            f"is writing to {folder.location}: wait for it to end, or choose another prefix"
        )
        still_ours()
    assert bucket.files() == {}


@pytest.mark.parametrize("fault", ["drop-answer", "503 SlowDown", "drop"])
def test_the_lock_survives_faults(bucket: Bucket, folder: S3Folder, fault: str) -> None:
    bucket.server.rule = lambda asked: fault if asked.nth == 1 else None
    with folder.lock() as still_ours:
        still_ours()
    bucket.server.clear(first("GetObject", "drop-half"))
    with folder.lock() as still_ours, pytest.raises(RuntimeError, match="is writing to"), folder.lock():
        pass
    assert bucket.files() == {}


def test_the_dead_of_this_machine_hold_nothing(bucket: Bucket, folder: S3Folder) -> None:
    code = "import os\nfrom data_prep.storage import open_folder\n"
    code += f"with open_folder({folder.location!r}).lock(): os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    key = folder.prefix + ".lock"
    holder = json.loads(bucket.get(key))
    with folder.lock():
        pass
    # Another container of this machine: that number may be alive there.
    bucket.put(key, json.dumps({**holder, "namespace": "pid:[1]"}).encode())
    with pytest.raises(RuntimeError, match="is writing to"), folder.lock():
        pass


def test_a_stale_lock_of_another_machine_is_taken_over(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = (b'{"host": "elsewhere", "pid": 7, "boot": "x"}', b"", b"[1]", b"junk")
    folders = [S3Folder(bucket.at(f"set-{number}")) for number in range(len(contents))]
    for folder, content in zip(folders, contents, strict=True):
        bucket.put(folder.prefix + ".lock", content)
        with pytest.raises(RuntimeError, match=r"last sign of life .* a dead one's lock ends after 90 s"):
            lock_of(folder).acquire()
    time.sleep(1.1)  # S3's times are whole seconds
    for folder in folders:
        monkeypatch.setattr(s3_lock, "LOCK_STALE_SECONDS", 0.5)
        taken = taken_by_four(folder)
        assert len(taken) == 1
        taken[0].check()
        taken[0].release()
    assert bucket.files() == {}


def taken_by_four(folder: S3Folder) -> list[s3_lock.LockObject]:
    """Who has the lock when four find it stale at the same time."""
    taken: list[s3_lock.LockObject] = []
    barrier = threading.Barrier(4)

    def take() -> None:
        lock = lock_of(folder)
        put = lock._put

        def together(*arguments: Any, **condition: str) -> bool:
            if "IfMatch" in condition:
                barrier.wait(10)
                s3_lock.LOCK_STALE_SECONDS = 90.0  # the winner's is none
            return put(*arguments, **condition)

        lock._put = together  # type: ignore[method-assign]
        with contextlib.suppress(RuntimeError):
            lock.acquire()
            taken.append(lock)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def test_a_writer_that_was_taken_for_dead_stops(
    bucket: Bucket, folder: S3Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_lock, "LOCK_STALE_SECONDS", 0.0)
    sleeper, other = lock_of(folder), lock_of(folder)
    sleeper.acquire()
    time.sleep(1.1)  # no heartbeat comes in the meantime: the machine is asleep
    other.acquire()
    with pytest.raises(RuntimeError, match=r"took .* over while this one could not be heard"):
        sleeper.check()
    sleeper.release()
    assert json.loads(bucket.get(folder.prefix + ".lock"))["id"] == other._owner["id"], "not the other's lock"
    other.check()
    other.release()
    assert bucket.files() == {}


def test_heartbeats_go_on_through_faults(
    bucket: Bucket, folder: S3Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_lock, "HEARTBEAT_SECONDS", 0.05)
    faults = ["", "drop-answer", "503 SlowDown", "409 ConditionalRequestConflict", "drop-upload", "500", ""]
    bucket.server.rule = lambda asked: (
        faults[asked.nth % len(faults)] or None if asked.operation == "PutObject" else None
    )
    with folder.lock() as still_ours:
        while len(bucket.server.all("PutObject")) < 20:
            time.sleep(0.01)
        still_ours()
    assert bucket.files() == {}


def test_no_secret_is_ever_printed(
    bucket: Bucket, folder: S3Folder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_requests, "_said", {"at": -99.0})
    bucket.server.rule = lambda asked: "503 SlowDown" if asked.nth < 5 else "403 SignatureDoesNotMatch"
    with pytest.raises(RuntimeError, match=r"access denied \(SignatureDoesNotMatch\)") as caught:
        folder.write("x", b"")
    printed = "".join(capfd.readouterr()) + str(caught.value)
    assert len(re.findall("SlowDown; trying again", printed)) == 1, "one line, not one a request"
    assert SECRET not in printed and "AWS4-HMAC" not in printed and "dummy" not in printed


def test_a_conditional_write_is_done_once_or_by_another(bucket: Bucket, folder: S3Folder) -> None:
    faults = (None, "drop-answer", "drop", "503 SlowDown", "409 ConditionalRequestConflict", "flip-upload")
    etag = None
    for number, fault in enumerate(faults):
        bucket.server.clear(first("PutObject", fault or ""))
        content, former = f"{number}{fault}".encode(), etag
        etag = folder.write_if("x", content, etag)
        assert etag is not None and folder.read_with_etag("x", 100) == (content, etag), fault
        assert bucket.get(folder.prefix + "x") == content
        bucket.server.clear()
        for outdated in (None, former, '"another"'):
            assert folder.write_if("x", b"late", outdated) is None
    # The answer is lost, and before the request is repeated another writer comes.
    bucket.server.clear(
        lambda asked: (
            "drop-answer"
            if (asked.operation, asked.nth) == ("PutObject", 1)
            else bucket.put(folder.prefix + "x", b"another's")  # type: ignore[func-returns-value]
            if asked.operation == "PutObject"
            else None
        )
    )
    assert folder.write_if("x", b"mine", etag) is None
    bucket.server.clear()
    folder.delete("x")
    assert folder.write_if("x", b"mine", etag) is None, "it was deleted"
    assert bucket.files() == {}


def test_small_objects_are_bounded_and_checked(bucket: Bucket, folder: S3Folder) -> None:
    folder.write("x", b"0123456789")
    content, etag = folder.read_with_etag("x", 10)
    assert content == b"0123456789"
    assert folder.read_with_etag("x", 9) == (None, etag)
    bucket.server.clear(first("GetObject", "flip-download"))
    assert folder.read_with_etag("x", 10) == (content, etag)
    bucket.server.clear(lambda asked: "flip-download" if asked.operation == "GetObject" else None)
    assert folder.read_with_etag("x", 10) == (None, etag), "whoever may write it anew needs its ETag"
    with pytest.raises(FileNotFoundError):
        folder.read_with_etag("y", 10)


def test_a_folder_may_be_less_patient_and_silent(
    bucket: Bucket, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_requests, "_said", {"at": -99.0})
    bucket.server.clear(lambda asked: "503 SlowDown")
    hasty = S3Folder(bucket.at("set"), attempts=3)
    with pytest.raises(RuntimeError, match=r"failed 3 times \(SlowDown\)$"):
        hasty.read("x")
    with pytest.raises(RuntimeError, match=r"failed 3 times \(SlowDown\)$"):
        hasty.files()
    assert len(bucket.server.asked) == 6 and capfd.readouterr().err == ""


def test_new_credentials_are_taken_up(
    bucket: Bucket, folder: S3Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.server.clear(first("PutObject", "400 ExpiredToken"))
    before = s3_requests.client()
    with pytest.raises(RuntimeError, match="have expired"):
        folder.write("x", b"")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    folder.write("x", b"")
    assert s3_requests.client() is not before
    assert s3_requests.client()._request_signer._credentials.access_key == "renewed"
