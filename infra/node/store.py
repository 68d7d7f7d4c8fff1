"""The bucket as the agent uses it: small records, conditional writes, listings with S3's own clock.

Example:
    >>> store = Store(Aws("us-east-1"), "my-bucket")
    >>> store.create("jobs/mine/end.json", b"{}")   # False where somebody was first
    True
"""

from __future__ import annotations

import contextlib
import email.utils
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.aws import Aws, AwsError
from infra.layout import MAX_RECORD_BYTES

REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


@dataclass(frozen=True)
class Listed:
    """An object; `age_seconds` since it was written, by the clock of S3."""

    key: str
    num_bytes: int
    age_seconds: float


class Store:
    """Objects of one bucket. Every method raises AwsError where S3 fails for good."""

    def __init__(self, aws: Aws, bucket: str) -> None:
        self._aws, self.bucket = aws, bucket
        aws.client("s3")  # made here, since threads share it

    def get(self, key: str) -> bytes | None:
        """A record; None where there is none. ValueError: too large for one."""
        found = self.get_with_etag(key)
        return None if found is None else found[0]

    def get_with_etag(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self._aws.call("s3", "get_object", Bucket=self.bucket, Key=key)
        except AwsError as error:
            if error.code == "NoSuchKey":
                return None
            raise
        with contextlib.closing(answer["Body"]) as body:
            if answer["ContentLength"] > MAX_RECORD_BYTES:
                raise ValueError(f"s3://{self.bucket}/{key} is larger than {MAX_RECORD_BYTES >> 10} KiB")
            return bytes(body.read()), str(answer["ETag"])

    def put(self, key: str, content: bytes) -> None:
        self._put(key, content)

    def create(self, key: str, content: bytes) -> bool:
        """Write what is not there yet; False where it is."""
        return self._put_if(key, content, IfNoneMatch="*")

    def replace(self, key: str, content: bytes, etag: str) -> bool:
        """Write what is still as it was read; False where it is not."""
        return self._put_if(key, content, IfMatch=etag)

    def upload(self, key: str, path: Path) -> None:
        """A file of up to 5 GB, in one request."""
        with path.open("rb") as file:
            self._put(key, file)

    def list(self, prefix: str) -> list[Listed]:
        """All objects below a prefix, sorted by key."""
        found: list[Listed] = []
        token: dict[str, str] = {}
        while True:
            answer = self._aws.call("s3", "list_objects_v2", Bucket=self.bucket, Prefix=prefix, **token)
            now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            for item in answer.get("Contents", ()):
                age = (now - item["LastModified"]).total_seconds()
                found.append(Listed(item["Key"], item["Size"], age))
            if not answer.get("IsTruncated"):
                return found
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def _put_if(self, key: str, content: bytes, **condition: str) -> bool:
        try:
            self._put(key, content, **condition)
        except AwsError as error:
            if error.code in REFUSED:
                return False
            raise
        return True

    def _put(self, key: str, content: Any, **condition: str) -> None:
        self._aws.call("s3", "put_object", Bucket=self.bucket, Key=key, Body=content, **condition)
