"""Copy a prepared data set between disks and S3: in parallel ranges, verified here, resumable.

Files are copied in pieces, several at once; from bucket to bucket S3 copies by itself. Every finished file is
read back from the target and compared with the manifest's SHA-256, so a wrong byte on either way is found.
The manifest comes last: a target without it is no data set. Called again, whole files are kept, and
unfinished ones go on after the pieces that are there.

Example:
    >>> copy_data_set("s3://my-bucket/imagenet", "/mnt/nvme/imagenet")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_NAME, QUARANTINE_NAME, FileEntry, Manifest, load_manifest
from data_prep.plain_json import parse_json
from data_prep.progress import progress_bar
from data_prep.storage import (
    Folder,
    LocalFolder,
    PiecewiseFile,
    crc32c,
    open_folder,
    retry_disk_full,
    sha256_of,
)

PIECE_BYTES = 16 << 20
MAX_PIECES = 9000  # S3 allows 10,000 parts
JOURNAL_FOLDER = ".copy"
CLAIM_NAME = f"{JOURNAL_FOLDER}/claim.json"  # says that the unfinished files beside it are ours
SMALL_BYTES = 4 << 20  # not worth pieces
ATTEMPTS = 3  # of a file whose checksum does not agree


@dataclass(frozen=True)
class CopyResult:
    """What `copy_data_set` did; `kept_bytes` were whole in the target already."""

    manifest: Manifest
    copied_bytes: int
    kept_bytes: int
    seconds: float


def copy_data_set(
    source: str,
    target: str,
    num_connections: int = 16,
    progress: bool = True,
    manifest_sha256: str | None = None,
) -> CopyResult:
    """Copy the data set at `source` to `target` (paths or `s3://bucket/prefix`).

    Args:
        manifest_sha256: 64 hexadecimal digits; a source whose manifest has others is refused. None: any.

    Raises:
        ValueError: no data set there, not the wanted version, another one in the target, or a damaged source
            file.
        RuntimeError: the disk is full, S3 fails for good, or another process writes to the target.
    """
    began = time.monotonic()
    source_folder, target_folder = open_folder(source), open_folder(target)
    manifest, content = read_manifest(source_folder)
    if manifest_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{source_folder.location} was prepared anew meanwhile: run the same command again")
    small = {MANIFEST_NAME: content}
    if manifest.quarantine is None and source_folder.info(QUARANTINE_NAME) is not None:
        small = {QUARANTINE_NAME: _read_surely(source_folder, QUARANTINE_NAME), **small}  # an old data set
    with target_folder.lock() as still_ours:
        _check_target(target_folder, manifest)
        entries = manifest.files
        total = sum(file.bytes for file in entries)
        copy = _Copy(source_folder, target_folder, num_connections, still_ours)
        with progress_bar(total, "copy", progress, unit="B") as bar:
            for entry in sorted(entries, key=lambda file: file.name):
                copy.file(entry, bar.update)
        still_ours()
        for name, content in small.items():
            target_folder.write(name, content)
        for left in target_folder.files(JOURNAL_FOLDER):
            target_folder.delete(left.name)
        if isinstance(target_folder, LocalFolder):
            with contextlib.suppress(OSError):  # somebody has put something there
                (target_folder.path / JOURNAL_FOLDER).rmdir()
    return CopyResult(manifest, copy.copied_bytes, copy.kept_bytes, time.monotonic() - began)


def read_manifest(source: Folder) -> tuple[Manifest, bytes]:
    """The manifest of a data set and the bytes that it was read from, the same on two readings.

    Raises:
        ValueError: as `load_manifest`.
        RuntimeError: its bytes differ from reading to reading, or S3 fails for good.
    """
    load_manifest(source)  # says what is wrong with it
    content = _read_surely(source, MANIFEST_NAME)
    return Manifest.model_validate_json(content), content


def _read_surely(folder: Folder, name: str) -> bytes:
    """A small file that no checksum is known of: read until it came twice with the same bytes."""
    try:
        content = folder.read(name)
        for _ in range(ATTEMPTS):
            before, content = content, folder.read(name)
            if content == before:
                return content
    except FileNotFoundError:
        raise ValueError(f"{folder.path_of(name)} is missing: that data set is damaged") from None
    raise RuntimeError(f"{folder.path_of(name)} comes with other bytes each time: check that disk or network")


def _check_target(target: Folder, manifest: Manifest) -> None:
    if target.info(MANIFEST_NAME) is None:
        if target.files(JOURNAL_FOLDER):
            return  # begun by us
        there_already = {file.name for file in target.children()}
        for entry in manifest.files:
            if entry.name in there_already and not _agrees(target, entry):
                raise ValueError(
                    f"{target.path_of(entry.name)} is there with another content, and no manifest: choose "
                    "another target, or delete it"
                )
        target.write(CLAIM_NAME, b"{}")
        return
    try:
        there = load_manifest(target)
    except ValueError:
        there = None
    if there != manifest:
        raise ValueError(
            f"{target.location} already holds another data set: choose another target, or delete it"
        )


def _agrees(folder: Folder, entry: FileEntry) -> bool:
    info = folder.info(entry.name)
    if info is None or info.num_bytes != entry.bytes:
        return False
    return sha256_of(folder, entry.name, entry.bytes) == entry.sha256


class _Copy:
    def __init__(
        self, source: Folder, target: Folder, num_connections: int, still_ours: Callable[[], None]
    ) -> None:
        self.source, self.target = source, target
        self.copied_bytes = self.kept_bytes = 0
        self._num_connections, self._still_ours = num_connections, still_ours

    def file(self, entry: FileEntry, advance: Callable[[int], Any]) -> None:
        """Copy one file, or find it whole; ends when the target's bytes have the manifest's checksum."""
        if _agrees(self.target, entry):
            self.kept_bytes += entry.bytes
            advance(entry.bytes)
            return
        self._check_source(entry)
        for attempt in range(1, ATTEMPTS + 1):
            self._still_ours()
            self._transfer(entry, advance if attempt == 1 else lambda _: None)
            if _agrees(self.target, entry):
                return
            self.target.delete(entry.name)
            if not _agrees(self.source, entry):
                raise ValueError(
                    f"{self.source.path_of(entry.name)} is damaged (its SHA-256 differs): prepare it again, "
                    "or copy from another place"
                )
            print(f"{entry.name} arrived with other bytes: copying it again", file=sys.stderr)
        raise RuntimeError(
            f"{self.target.path_of(entry.name)} came back wrong {ATTEMPTS} times: check that disk or network"
        )

    def _check_source(self, entry: FileEntry) -> None:
        info = self.source.info(entry.name)
        if info is None or info.num_bytes != entry.bytes:
            found = (
                "is missing" if info is None else f"has {info.num_bytes:,} bytes instead of {entry.bytes:,}"
            )
            raise ValueError(
                f"{self.source.path_of(entry.name)} {found}: that data set is damaged; prepare it again"
            )

    def _transfer(self, entry: FileEntry, advance: Callable[[int], Any]) -> None:
        if entry.bytes <= SMALL_BYTES:
            self.target.write(entry.name, self.source.read(entry.name))
            self.copied_bytes += entry.bytes
            advance(entry.bytes)
            return
        piece_bytes = PIECE_BYTES
        while piece_bytes * MAX_PIECES < entry.bytes:
            piece_bytes *= 2
        num_pieces = max(1, -(-entry.bytes // piece_bytes))
        file, done, journal = self._begin(entry, piece_bytes)
        try:
            for number, crc in sorted(done.items()):
                length = min(piece_bytes, entry.bytes - number * piece_bytes)
                piece = file.read_piece(number, length)
                if piece is not None and crc32c(piece) != crc:
                    del done[number]
                else:
                    advance(length)
                    self.kept_bytes += length
            missing = [number for number in range(num_pieces) if number not in done]
            with ThreadPoolExecutor(self._num_connections, thread_name_prefix="copy") as pool:
                futures = [
                    pool.submit(self._piece, file, entry, number, piece_bytes, journal) for number in missing
                ]
                try:
                    for future in futures:
                        length = future.result()
                        advance(length)
                        self.copied_bytes += length
                finally:
                    for future in futures:
                        future.cancel()
            file.finish(num_pieces, entry.bytes)
        finally:
            file.close()
        self.target.delete(journal)

    def _begin(self, entry: FileEntry, piece_bytes: int) -> tuple[PiecewiseFile, dict[int, int], str]:
        """The file in the target, its pieces that an earlier start left (number → CRC-32C), the journal."""
        journal = f"{JOURNAL_FOLDER}/{entry.sha256}.jsonl"
        lines = _read_lines(self.target, journal)
        head = lines[0] if lines else {}
        if head.get("piece_bytes") == piece_bytes and isinstance(head.get("token"), str):
            file = self.target.create(entry.name, piece_bytes, str(head["token"]))
            try:
                durable = file.durable_pieces()
            except FileNotFoundError:
                durable = set()
            if isinstance(self.target, LocalFolder):
                done = {int(line["piece"]): int(line["crc32c"]) for line in lines[1:] if "crc32c" in line}
                done = {number: crc for number, crc in done.items() if number in durable}
            else:
                # A part that S3 lists is whole; what it holds is checked with the file.
                done = dict.fromkeys(durable, 0)
            if done:
                return file, done, journal
            file.close()
        self.target.abort_unfinished(entry.name)
        file = self.target.create(entry.name, piece_bytes)
        first = json.dumps({"piece_bytes": piece_bytes, "token": file.token}) + "\n"
        self.target.write(journal, first.encode())
        return file, {}, journal

    def _piece(
        self, file: PiecewiseFile, entry: FileEntry, number: int, piece_bytes: int, journal: str
    ) -> int:
        offset = number * piece_bytes
        length = min(piece_bytes, entry.bytes - offset)
        copy_from = getattr(file, "copy_from", None)
        bucket = getattr(self.source, "bucket", None)
        if copy_from is not None and bucket is not None and length:
            copy_from(number, bucket, f"{self.source.prefix}{entry.name}", offset, length)  # type: ignore[attr-defined]
            return length
        content = self.source.read(entry.name, offset, length)
        if len(content) != length:
            raise ValueError(f"{self.source.path_of(entry.name)} ends early: that data set is damaged")
        file.put(number, content)
        if isinstance(self.target, LocalFolder):
            line = json.dumps({"piece": number, "crc32c": crc32c(content)}) + "\n"

            def append(path: Path = self.target.path / journal) -> None:
                with path.open("a") as log:
                    log.write(line)  # one short write: appends of several threads do not mix

            retry_disk_full(append)
        return length


def _read_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    try:
        content = folder.read(name).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    lines = []
    for line in content.splitlines():
        try:
            value = parse_json(line)
        except ValueError:  # the last line of a killed process
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
