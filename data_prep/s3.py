"""S3 as a `Folder`.

Uploads carry a CRC-32C for S3 to check; who needs to be sure on this side reads back. How requests are made
and repeated: see s3_requests.py. A repeated request may meet what its own first attempt did.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from data_prep.s3_lock import LOCK_NAME, LockObject
from data_prep.s3_requests import (
    Damaged,
    TooLarge,
    checksum,
    client,
    fetch,
    read_object,
    retry,
    split_location,
)
from data_prep.storage import FileInfo, Folder, PiecewiseFile

__all__ = ["S3Folder", "client", "read_object", "split_location"]

CLEANING_ATTEMPTS = 3  # what remains is cleaned by the next start
CONDITION_ATTEMPTS = 4  # of a conditional write that came back damaged, or met a conflict of a moment

Result = TypeVar("Result")


class S3Folder(Folder):
    """The objects below a prefix.

    Args:
        attempts: of each request, see `retry`; None for its own number of them.
    """

    def __init__(self, location: str, attempts: int | None = None) -> None:
        self._attempts = attempts
        self.bucket, prefix = split_location(location)
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.location = f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def retry(self, what: str, action: Callable[[], Result], most: int | None = None) -> Result:
        """As `s3_requests.retry`, at most as often as this folder does it."""
        attempts = [number for number in (self._attempts, most) if number is not None]
        return retry(what, action, min(attempts, default=None))

    def files(self, below: str = "") -> list[FileInfo]:
        return self._list(self.prefix + (below.rstrip("/") + "/" if below else ""), {})

    def children(self) -> list[FileInfo]:
        return self._list(self.prefix, {"Delimiter": "/"})

    def _list(self, start: str, options: dict[str, str]) -> list[FileInfo]:
        pages = self._pages(
            f"listing {self.location}",
            lambda place: client().list_objects_v2(Bucket=self.bucket, Prefix=start, **options, **place),
            {"ContinuationToken": "NextContinuationToken"},
        )
        found = [
            FileInfo(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")  # the "folders" that the console makes
        ]
        return sorted(found, key=lambda file: file.name)

    def info(self, name: str) -> FileInfo | None:
        try:
            head = self.retry(
                f"asking for {self.path_of(name)}",
                lambda: client().head_object(Bucket=self.bucket, Key=self.prefix + name),
            )
        except FileNotFoundError:
            return None
        return FileInfo(name, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return read_object(self.path_of(name), offset, length, self._attempts)

    def read_with_etag(self, name: str, most_bytes: int) -> tuple[bytes | None, str]:
        """A small object, and the ETag for `write_if`. FileNotFoundError.

        The content is None where it is larger than `most_bytes`, or does not fit its checksum each time that
        it comes.
        """
        tries, most_tries = 0, min(CONDITION_ATTEMPTS, self._attempts or CONDITION_ATTEMPTS)

        def get() -> tuple[bytes | None, str]:
            nonlocal tries
            tries += 1
            try:
                content, answer = fetch(most_bytes, Bucket=self.bucket, Key=self.prefix + name)
            except Damaged as error:
                if error.etag and (tries == most_tries or isinstance(error, TooLarge)):
                    return None, error.etag
                raise
            return content, str(answer["ETag"])

        return self.retry(f"reading {self.path_of(name)}", get)

    def write(self, name: str, content: bytes) -> None:
        """As `Folder.write`; read back, since not every server that speaks S3 compares the checksum."""
        where: dict[str, Any] = {"Bucket": self.bucket, "Key": self.prefix + name}

        def put() -> None:
            client().put_object(
                **where,
                Body=content,
                ChecksumAlgorithm="CRC32C",
                ChecksumCRC32C=checksum(content),
            )
            if fetch(**where)[0] != content:
                raise Damaged("it came back with other bytes than were written")

        self.retry(f"writing {self.path_of(name)}", put)

    def write_if(self, name: str, content: bytes, etag: str | None) -> str | None:
        """Write a small object, if it still is what `etag` tells of (None: if there still is none).

        A repeated request may meet what its own first attempt did, which counts as written: so `content` must
        be unlike all that this or another writer ever wrote there.

        Returns: its new ETag; None where another writer was faster, or the object was deleted.
        """
        where = {"Bucket": self.bucket, "Key": self.prefix + name}
        sums = {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": checksum(content)}
        for _ in range(CONDITION_ATTEMPTS):
            condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
            written = None
            with contextlib.suppress(FileNotFoundError, ClientError):  # the condition was refused
                written = self.retry(
                    f"writing {self.path_of(name)}",
                    lambda condition=condition: client().put_object(  # type: ignore[misc]
                        **where, Body=content, **sums, **condition
                    )["ETag"],
                )
            try:
                found, now = self.read_with_etag(name, len(content))
            except FileNotFoundError:
                return None
            if found == content:
                return now
            if now not in (written, etag):
                return None
            etag = now  # damaged on the way there, or refused for a conflict that changed nothing
        raise RuntimeError(f"writing {self.path_of(name)}: it came back with other bytes than were written")

    def delete(self, name: str) -> None:
        # No such bucket, no such object: S3 says nothing of the latter, its imitations do.
        with contextlib.suppress(FileNotFoundError):
            self.retry(
                f"deleting {self.path_of(name)}",
                lambda: client().delete_object(Bucket=self.bucket, Key=self.prefix + name),
            )

    def create(self, name: str, piece_bytes: int, token: str | None = None) -> PiecewiseFile:
        return _MultipartUpload(self, name, token)

    def unfinished(self, name: str = "") -> list[tuple[str, str]]:
        """(name, token) of the unfinished uploads below the prefix, or of those of one name."""
        pages = self._pages(
            f"listing uploads of {self.path_of(name)}",
            lambda place: client().list_multipart_uploads(
                Bucket=self.bucket, Prefix=self.prefix + name, **place
            ),
            {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
        )
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        found = [(upload["Key"][len(self.prefix) :], upload["UploadId"]) for upload in uploads]
        return [(theirs, token) for theirs, token in found if name in ("", theirs)]

    def abort_unfinished(self, name: str, keep: str | None = None) -> None:
        """Remove unfinished uploads of `name`: they cost storage and nobody sees them."""
        for _, token in self.unfinished(name):
            if token != keep:
                _MultipartUpload(self, name, token).abort()

    def _pages(
        self, what: str, ask: Callable[[dict[str, Any]], dict[str, Any]], markers: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """The pages of a long answer, each tried again alone.

        Args:
            markers: argument of a request → field of the page before that it is.
        """
        place: dict[str, Any] = {}
        while True:
            page = self.retry(what, lambda place=place: ask(place))  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            place = {argument: page[field] for argument, field in markers.items() if page.get(field)}

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        lock = LockObject(self.location, self.bucket, self.prefix + LOCK_NAME)
        lock.acquire()
        try:
            yield lock.check
        finally:
            lock.release()


class _MultipartUpload(PiecewiseFile):
    def __init__(self, folder: S3Folder, name: str, token: str | None) -> None:
        self._folder, self._name = folder, name
        self._location = folder.path_of(name)
        where = {"Bucket": folder.bucket, "Key": folder.prefix + name}
        self._parts: dict[int, dict[str, Any]] = {}
        self._mutex = threading.Lock()
        if token is None:
            answer = folder.retry(
                f"beginning {self._location}",
                lambda: client().create_multipart_upload(
                    **where, ChecksumAlgorithm="CRC32C", ChecksumType="COMPOSITE"
                ),
            )
            token = str(answer["UploadId"])
        self.token = token
        self._upload = {**where, "UploadId": token}

    def put(self, number: int, content: bytes | bytearray | memoryview) -> None:
        content = bytes(content)
        crc = checksum(content)
        answer = self._while_there(
            lambda: client().upload_part(
                **self._upload,
                PartNumber=number + 1,
                Body=content,
                ChecksumAlgorithm="CRC32C",
                ChecksumCRC32C=crc,
            )
        )
        with self._mutex:
            self._parts[number] = {"PartNumber": number + 1, "ETag": answer["ETag"], "ChecksumCRC32C": crc}

    def copy_from(self, number: int, bucket: str, key: str, offset: int, length: int) -> None:
        """Let S3 copy a range of another object into piece `number`, without moving it through here."""
        answer = self._while_there(
            lambda: client().upload_part_copy(
                **self._upload,
                PartNumber=number + 1,
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={offset}-{offset + length - 1}",
            )
        )
        with self._mutex:
            self._parts[number] = _part({"PartNumber": number + 1, **answer["CopyPartResult"]})

    def _while_there(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return self._folder.retry(f"writing {self._location}", action)
        except FileNotFoundError:
            raise RuntimeError(
                f"the unfinished {self._location} (or what is copied to it) was removed meanwhile, by a rule "
                "of the bucket or another program: run the same command again"
            ) from None

    def read_piece(self, number: int, num_bytes: int) -> bytes | None:
        return None

    def durable_pieces(self) -> set[int]:
        """Also takes them over for `finish`. FileNotFoundError: that upload is gone."""
        pages = self._folder._pages(
            f"listing parts of {self._location}",
            lambda place: client().list_parts(**self._upload, **place),
            {"PartNumberMarker": "NextPartNumberMarker"},
        )
        for page in pages:
            for part in page.get("Parts", ()):
                self._parts[part["PartNumber"] - 1] = _part(part)
        return set(self._parts)

    def finish(self, num_pieces: int, num_bytes: int) -> None:
        parts = [self._parts[number] for number in range(num_pieces)]
        try:
            self._folder.retry(
                f"finishing {self._location}",
                lambda: client().complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts}),
            )
        except FileNotFoundError:
            # Its answer was lost and the repeated request found nothing left to do, or it is really gone.
            info = self._folder.info(self._name)
            if info is None or info.num_bytes != num_bytes:
                raise RuntimeError(
                    f"the unfinished {self._location} was removed meanwhile, by a rule of the bucket or "
                    "another program: run the same command again"
                ) from None
        # Of killed starts, and of a request to begin whose answer was lost.
        with contextlib.suppress(RuntimeError):
            self._folder.abort_unfinished(self._name, keep=self.token)

    def close(self) -> None:
        pass

    def abort(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._folder.retry(
                f"removing the unfinished {self._location}",
                lambda: client().abort_multipart_upload(**self._upload),
                CLEANING_ATTEMPTS,
            )


def _part(known: dict[str, Any]) -> dict[str, Any]:
    return {key: known[key] for key in ("PartNumber", "ETag", "ChecksumCRC32C") if known.get(key)}
