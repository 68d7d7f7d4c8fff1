"""Requests to S3: one client a process, and one way to try again; the only module that imports boto3.

Credentials, region and endpoint are the user's own, found as every AWS tool finds them (`AWS_PROFILE`,
instance role, `AWS_ENDPOINT_URL` …). Every request is tried again here, with backoff, as long as its fault
may pass: throttling, 5xx, a dropped or stalled connection, a body that broke off or did not fit its checksum.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import boto3
import google_crc32c
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from urllib3.exceptions import HTTPError

from data_prep.storage import without_password

MAX_ATTEMPTS = int(os.environ.get("S3_MAX_ATTEMPTS", "10"))  # of a request, about a minute in all
MAX_WAIT_SECONDS = float(os.environ.get("S3_MAX_WAIT_SECONDS", "20"))  # between two of them
TIMEOUT_SECONDS = float(os.environ.get("S3_TIMEOUT_SECONDS", "30"))  # of a connection that gives nothing
SAY_EVERY_SECONDS = 10.0  # many threads meet the same trouble
MAX_CONNECTIONS = 256  # kept open; more than any command has threads

DENIED = ("403", "AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch")
EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
MISSING = ("404", "NoSuchKey", "NoSuchUpload", "NotFound")
REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "InvalidRange", "412", "409")
PASSING = (
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
)

Result = TypeVar("Result")

_making = threading.Lock()
_said = {"at": -SAY_EVERY_SECONDS}


class Damaged(Exception):
    """What came back is not what was sent; worth another attempt.

    Attributes:
        etag: of the object, or "" where its body did not come whole.
    """

    def __init__(self, reason: str, etag: str = "") -> None:
        super().__init__(reason)
        self.etag = etag


class TooLarge(Damaged):
    """An object is larger than anything that should be there; it was not read."""


def client() -> Any:
    """The process's S3 client; safe for its threads."""
    with _making:  # else the threads of a worker would each make one, and ask for credentials
        return _client()


@functools.cache
def _client() -> Any:
    config = Config(
        # `retry` does it: botocore's own has a quota, which a storm of SlowDown uses up at once.
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=MAX_CONNECTIONS,
        connect_timeout=min(10.0, TIMEOUT_SECONDS),
        read_timeout=TIMEOUT_SECONDS,
    )
    return boto3.session.Session().client("s3", config=config)


def split_location(location: str) -> tuple[str, str]:
    """`s3://bucket/some/key` → ("bucket", "some/key").

    Raises:
        ValueError: that is no bucket name.
    """
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", location, re.DOTALL)
    if match is None:
        raise ValueError(
            f"{without_password(location)} names no bucket: write s3://bucket/prefix, the bucket in 3 to 63 "
            "small letters, digits, dots and hyphens"
        )
    return match[1], match[2] or ""


def read_object(
    location: str, offset: int = 0, length: int | None = None, attempts: int | None = None
) -> bytes:
    """A range of an object; see `storage.read_range`, and `retry` for `attempts`."""
    bucket, key = split_location(location)
    if length == 0:
        return b""
    until = "" if length is None else str(offset + length - 1)
    span: dict[str, Any] = {"Range": f"bytes={offset}-{until}"} if offset or length is not None else {}
    try:
        return retry(f"reading {location}", lambda: fetch(Bucket=bucket, Key=key, **span)[0], attempts)
    except ClientError as error:
        if code_of(error) == "InvalidRange":
            return b""  # from the end of the object on, or an empty one
        raise


def fetch(most_bytes: int | None = None, **where: Any) -> tuple[bytes, dict[str, Any]]:
    """One attempt to get an object (or `Range` of it): its whole body, and S3's answer.

    Raises:
        Damaged: the body is cut short or does not fit its checksum, or is larger than `most_bytes`.
    """
    answer = client().get_object(ChecksumMode="ENABLED", **where)
    with contextlib.closing(answer["Body"]) as body:
        if most_bytes is not None and answer["ContentLength"] > most_bytes:
            raise TooLarge(f"it has more than {most_bytes:,} bytes", answer["ETag"])
        content = body.read()
    if len(content) != answer["ContentLength"]:
        raise Damaged(f"{len(content)} of {answer['ContentLength']} bytes came")
    # botocore compares others, but not this one. What was put in parts has one of the parts' ("…-3").
    theirs = answer.get("ChecksumCRC32C", "-")
    if "-" not in theirs and "Range" not in where and theirs != checksum(content):
        raise Damaged("other bytes came than S3 says it has", answer["ETag"])
    return content, answer


def checksum(content: bytes) -> str:
    """CRC-32C as S3 writes it."""
    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def retry(what: str, action: Callable[[], Result], attempts: int | None = None) -> Result:
    """Do it, again with backoff where the fault may pass.

    Args:
        attempts: how often at most; where it is given, the caller has its own way to go on, and nothing is
            printed.

    Raises:
        FileNotFoundError: no such object or upload.
        ClientError: a refused condition or range; the caller knows what it means.
        RuntimeError: everything else, as a sentence.
    """
    quiet = attempts is not None
    attempts = attempts or MAX_ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except ClientError as error:
            reason, passing = _judged(what, error), _is_passing(error)
        except NoCredentialsError:
            _client.cache_clear()
            raise RuntimeError(
                f"{what}: no AWS credentials were found: run aws configure, set AWS_PROFILE, or give the "
                "instance a role"
            ) from None
        except Damaged as error:
            reason, passing = str(error), True
        except (NoConnectionError, HTTPClientError, IncompleteReadError, HTTPError, ConnectionError) as error:
            reason, passing = type(error).__name__, True
        except BotoCoreError as error:
            reason, passing = str(error), "checksum" in type(error).__name__.lower()
        if not passing:
            raise RuntimeError(f"{what} failed ({reason})")
        if attempt < attempts:
            wait = random.uniform(0.5, 1.0) * min(MAX_WAIT_SECONDS, 0.25 * 2**attempt)
            if attempt > 1 and not quiet:
                _say(f"{what}: {reason}; trying again in {wait:.0f} s")
            time.sleep(wait)
    advice = "" if quiet else ": run the same command again to go on from here"
    raise RuntimeError(f"{what} failed {attempts} times ({reason}){advice}")


def _judged(what: str, error: ClientError) -> str:
    """The error's code as a reason, where it is nothing that has a sentence of its own."""
    code = code_of(error)
    if code in REFUSED:
        raise error
    if code == "NoSuchBucket":
        raise RuntimeError(f"{what}: there is no such bucket; make it, or check its name") from None
    if code in MISSING:
        raise FileNotFoundError(f"{what}: not found") from None
    if code in (*DENIED, *EXPIRED):
        _client.cache_clear()  # whoever tries again later gets the credentials of then
    if code in DENIED:
        raise RuntimeError(f"{what}: access denied ({code}): check the credentials' rights") from None
    if code in EXPIRED:
        raise RuntimeError(f"{what}: the credentials have expired ({code}): log in again") from None
    if code == "RequestTimeTooSkewed":
        raise RuntimeError(f"{what}: this machine's clock is wrong, so S3 refuses it: set it") from None
    return code


def _is_passing(error: ClientError) -> bool:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return code_of(error) in PASSING or status == 429 or (status >= 500 and status != 501)


def _say(line: str) -> None:
    now = time.monotonic()
    if now - _said["at"] >= SAY_EVERY_SECONDS:
        _said["at"] = now
        print(line, file=sys.stderr)
