"""S3 as a `Folder`: the only module that imports boto3.

Credentials, region and endpoint are the user's own, found as every AWS tool finds them (`AWS_PROFILE`,
instance role, `AWS_ENDPOINT_URL` …). Requests are retried with backoff by botocore (throttling, 5xx, dropped
connections); bodies that break off are retried here. Uploads carry a CRC-32C for S3 to check; who needs to be
sure on this side reads back.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import google_crc32c
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError
from urllib3.exceptions import HTTPError

from data_prep.storage import FileInfo, Folder, PiecewiseFile

MAX_ATTEMPTS = int(os.environ.get("S3_MAX_ATTEMPTS", "8"))  # of a request, and of reading a body
MAX_WAIT_SECONDS = 20.0  # between two of them
LOCK_NAME = ".lock"
HEARTBEAT_SECONDS = 15.0
LOCK_STALE_SECONDS = 90.0  # six heartbeats missed: that writer is dead

Result = TypeVar("Result")


@functools.cache
def client() -> Any:
    """The process's S3 client; safe for its threads."""
    config = Config(
        retries={"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"},
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=30,
    )
    return boto3.session.Session().client("s3", config=config)


def split_location(location: str) -> tuple[str, str]:
    """`s3://bucket/some/key` → ("bucket", "some/key").

    Raises:
        ValueError: that is no bucket name.
    """
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", location, re.DOTALL)
    if match is None:
        raise ValueError(f"{location} names no bucket: write s3://bucket/prefix")
    return match[1], match[2] or ""


def read_object(location: str, offset: int = 0, length: int | None = None) -> bytes:
    """A range of an object; see `storage.read_range`."""
    bucket, key = split_location(location)
    if length == 0:
        return b""
    until = "" if length is None else str(offset + length - 1)

    def fetch() -> bytes:
        arguments = {"Range": f"bytes={offset}-{until}"} if offset or length is not None else {}
        try:
            answer = client().get_object(Bucket=bucket, Key=key, **arguments)
        except ClientError as error:
            if _code(error) == "InvalidRange":
                return b""  # from the end of the object on, or an empty one
            raise
        with contextlib.closing(answer["Body"]) as body:
            content = body.read()
        if len(content) != answer["ContentLength"]:
            raise HTTPError(f"{len(content)} of {answer['ContentLength']} bytes came")
        return content

    return _retry(f"reading {location}", fetch)


class S3Folder(Folder):
    """The objects below a prefix."""

    def __init__(self, location: str) -> None:
        self.bucket, prefix = split_location(location)
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.location = f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def files(self, below: str = "") -> list[FileInfo]:
        return self._list(self.prefix + (below.rstrip("/") + "/" if below else ""), {})

    def children(self) -> list[FileInfo]:
        return self._list(self.prefix, {"Delimiter": "/"})

    def _list(self, start: str, options: dict[str, str]) -> list[FileInfo]:
        def fetch() -> list[FileInfo]:
            pages = (
                client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.bucket, Prefix=start, **options)
            )
            return [
                FileInfo(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # the "folders" that the console makes
            ]

        return sorted(_retry(f"listing {self.location}", fetch), key=lambda file: file.name)

    def info(self, name: str) -> FileInfo | None:
        try:
            head = _retry(
                f"asking for {self.path_of(name)}",
                lambda: client().head_object(Bucket=self.bucket, Key=self.prefix + name),
            )
        except FileNotFoundError:
            return None
        return FileInfo(name, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return read_object(self.path_of(name), offset, length)

    def write(self, name: str, content: bytes) -> None:
        _retry(
            f"writing {self.path_of(name)}",
            lambda: client().put_object(
                Bucket=self.bucket,
                Key=self.prefix + name,
                Body=content,
                ChecksumAlgorithm="CRC32C",
                ChecksumCRC32C=_checksum(content),
            ),
        )

    def delete(self, name: str) -> None:
        _retry(
            f"deleting {self.path_of(name)}",
            lambda: client().delete_object(Bucket=self.bucket, Key=self.prefix + name),
        )

    def create(self, name: str, piece_bytes: int, token: str | None = None) -> PiecewiseFile:
        return _MultipartUpload(self.bucket, self.prefix + name, token)

    def abort_unfinished(self, name: str, keep: str | None = None) -> None:
        """Remove unfinished uploads of `name`: they cost storage and nobody sees them."""
        key = self.prefix + name
        answer = _retry(
            f"listing uploads of {self.path_of(name)}",
            lambda: client().list_multipart_uploads(Bucket=self.bucket, Prefix=key),
        )
        for upload in answer.get("Uploads", ()):
            if upload["Key"] == key and upload["UploadId"] != keep:
                with contextlib.suppress(FileNotFoundError):
                    _MultipartUpload(self.bucket, key, upload["UploadId"]).abort()

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        lock = _LockObject(self)
        lock.acquire()
        try:
            yield lock.check
        finally:
            lock.release()


class _MultipartUpload(PiecewiseFile):
    def __init__(self, bucket: str, key: str, token: str | None) -> None:
        self._bucket, self._key = bucket, key
        self._location = f"s3://{bucket}/{key}"
        self._parts: dict[int, dict[str, Any]] = {}
        self._mutex = threading.Lock()
        if token is None:
            answer = _retry(
                f"beginning {self._location}",
                lambda: client().create_multipart_upload(
                    Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32C", ChecksumType="COMPOSITE"
                ),
            )
            token = str(answer["UploadId"])
        self.token = token

    def _upload(self) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key, "UploadId": self.token}

    def put(self, number: int, content: bytes | bytearray | memoryview) -> None:
        content = bytes(content)
        checksum = _checksum(content)
        answer = _retry(
            f"writing {self._location}",
            lambda: client().upload_part(
                **self._upload(),
                PartNumber=number + 1,
                Body=content,
                ChecksumAlgorithm="CRC32C",
                ChecksumCRC32C=checksum,
            ),
        )
        with self._mutex:
            self._parts[number] = {
                "PartNumber": number + 1,
                "ETag": answer["ETag"],
                "ChecksumCRC32C": checksum,
            }

    def copy_from(self, number: int, bucket: str, key: str, offset: int, length: int) -> None:
        """Let S3 copy a range of another object into piece `number`, without moving it through here."""
        answer = _retry(
            f"copying to {self._location}",
            lambda: client().upload_part_copy(
                **self._upload(),
                PartNumber=number + 1,
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={offset}-{offset + length - 1}",
            ),
        )
        part = {"PartNumber": number + 1, "ETag": answer["CopyPartResult"]["ETag"]}
        if checksum := answer["CopyPartResult"].get("ChecksumCRC32C"):
            part["ChecksumCRC32C"] = checksum
        with self._mutex:
            self._parts[number] = part

    def read_piece(self, number: int, num_bytes: int) -> bytes | None:
        return None

    def durable_pieces(self) -> set[int]:
        """Also takes them over for `finish`. FileNotFoundError: that upload is gone."""

        def fetch() -> list[dict[str, Any]]:
            pages = client().get_paginator("list_parts").paginate(**self._upload())
            return [part for page in pages for part in page.get("Parts", ())]

        for part in _retry(f"listing parts of {self._location}", fetch):
            known = {"PartNumber": part["PartNumber"], "ETag": part["ETag"]}
            if "ChecksumCRC32C" in part:
                known["ChecksumCRC32C"] = part["ChecksumCRC32C"]
            self._parts[part["PartNumber"] - 1] = known
        return set(self._parts)

    def finish(self, num_pieces: int, num_bytes: int) -> None:
        parts = [self._parts[number] for number in range(num_pieces)]
        _retry(
            f"finishing {self._location}",
            lambda: client().complete_multipart_upload(**self._upload(), MultipartUpload={"Parts": parts}),
        )

    def close(self) -> None:
        pass

    def abort(self) -> None:
        _retry(
            f"removing the unfinished {self._location}",
            lambda: client().abort_multipart_upload(**self._upload()),
        )


class _LockObject:
    """A lock that is an object: made by a conditional write, refreshed by a thread, stale when that stops."""

    def __init__(self, folder: S3Folder) -> None:
        self._folder = folder
        self._where = {"Bucket": folder.bucket, "Key": folder.prefix + LOCK_NAME}
        self._owner = {"id": uuid.uuid4().hex, **_this_process()}
        self._etag = ""
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="s3-lock", daemon=True)

    def acquire(self) -> None:
        # Two writers that find a stale lock both try to take it; the condition lets one through.
        if not self._put(IfNoneMatch="*"):
            holder, etag, age = self._holder()
            if not (age > LOCK_STALE_SECONDS or _is_dead(holder)) or not self._put(IfMatch=etag):
                raise RuntimeError(
                    f"another process ({holder.get('host', '?')}, pid {holder.get('pid', '?')}, last sign of "
                    f"life {age:.0f} s ago) is writing to {self._folder.location}: wait for it to end, or "
                    f"choose another prefix; a dead one's lock ends after {LOCK_STALE_SECONDS:.0f} s"
                )
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise RuntimeError(
                f"another process took {self._folder.location} over while this one could not be heard: "
                "this one stops, and the other goes on"
            )

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                self._folder.delete(LOCK_NAME)

    def _refresh(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # An S3 that does not answer is no reason to stop: the writer itself will see it.
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                if not self._put(IfMatch=self._etag):
                    self._lost = True
                    return

    def _put(self, **condition: str) -> bool:
        self._owner["beat"] = time.time_ns()
        body = json.dumps(self._owner).encode()
        try:
            answer = _retry(
                f"locking {self._folder.location}",
                lambda: client().put_object(**self._where, Body=body, **condition),
            )
        except FileNotFoundError:
            return False  # If-Match on a lock that its holder has just released
        except ClientError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return self._is_ours()  # a repeated request may have met its own first attempt
            raise
        self._etag = answer["ETag"]
        return True

    def _is_ours(self) -> bool:
        holder, etag, _ = self._holder()
        if holder.get("id") != self._owner["id"]:
            return False
        self._etag = etag
        return True

    def _holder(self) -> tuple[dict[str, Any], str, float]:
        try:
            answer = _retry("reading the lock", lambda: client().get_object(**self._where))
            content = answer["Body"].read()
        except FileNotFoundError:
            return {}, "", LOCK_STALE_SECONDS + 1
        # Both times are the server's: this machine's clock may be wrong.
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        age = time.time() - answer["LastModified"].timestamp()
        if now:
            from email.utils import parsedate_to_datetime

            age = (parsedate_to_datetime(now) - answer["LastModified"]).total_seconds()
        try:
            holder = dict(json.loads(content))
        except ValueError:
            holder = {}
        return holder, answer["ETag"], age


def _this_process() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """A process of this very boot of this machine that is no more."""
    here = _this_process()
    if not holder.get("boot") or holder["boot"] != here["boot"] or holder.get("host") != here["host"]:
        return False
    return _start_time(int(holder.get("pid", 0))) != holder.get("started")


def _checksum(content: bytes) -> str:
    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _retry(what: str, action: Callable[[], Result]) -> Result:
    """Do it, again with backoff where the network or S3 broke off; botocore has retried the request itself.

    Raises:
        FileNotFoundError: no such object, bucket or upload.
        ClientError: a refused condition; the caller knows what it means.
        RuntimeError: everything else, as a sentence.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return action()
        except NoCredentialsError:
            raise RuntimeError(
                f"{what}: no AWS credentials were found: run aws configure, set AWS_PROFILE, or give the "
                "instance a role"
            ) from None
        except ClientError as error:
            code = _code(error)
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "InvalidRange", "412", "409"):
                raise
            if code == "NoSuchBucket":
                raise RuntimeError(f"{what}: there is no such bucket") from None
            if code in ("404", "NoSuchKey", "NoSuchUpload", "NotFound"):
                raise FileNotFoundError(f"{what}: not found") from None
            if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise RuntimeError(f"{what}: access denied ({code}): check the credentials' rights") from None
            reason, repeat = code, code in ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch")
        except (HTTPClientError, HTTPError, ConnectionError) as error:
            reason, repeat = type(error).__name__, True
        except BotoCoreError as error:
            reason, repeat = str(error), "checksum" in type(error).__name__.lower()
        if not repeat or attempt == MAX_ATTEMPTS:
            raise RuntimeError(
                f"{what} failed after several attempts ({reason}): run the same command again to go on"
            )
        wait = random.uniform(0.5, 1.0) * min(MAX_WAIT_SECONDS, 0.25 * 2**attempt)
        print(f"{what}: {reason}; trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("unreachable")
