"""Moving a file to S3 and back, in pieces, believed only when its SHA-256 is right on this side."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from data_prep.storage import sync_folder

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

PIECE_BYTES = 16 << 20  # a part; what is smaller goes in one request
MOST_PIECES = 9_000  # S3 takes 10,000
THREADS = 4  # S3 gives some 5 Gbit/s a connection; memory: twice as many pieces
UPLOAD_ATTEMPTS = 3  # of a file that arrives damaged

Result = TypeVar("Result")


class Stopped(Exception):
    """Nobody waits for the rest of this transfer."""


class NotWhole(ValueError):
    """A file or object is not what its checksum says."""


class HeldFile:
    """A file of the run folder as it is now: open, so that it can be read after it was deleted or replaced.

    Of one that is appended to, only what was there.

    Attributes:
        step, sha256: of a checkpoint; None for another file.
    """

    def __init__(self, path: Path, step: int | None = None, sha256: str | None = None) -> None:
        self.name, self.step, self.sha256 = path.name, step, sha256
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        pieces: list[bytes] = []
        length = min(length, self.num_bytes - offset)
        while length > 0 and (piece := os.pread(self._descriptor, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def digest(self) -> str:
        """SHA-256 of what is there."""
        digest = hashlib.sha256()
        for offset in range(0, self.num_bytes, 1 << 20):
            digest.update(self.read(offset, 1 << 20))
        return digest.hexdigest()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __str__(self) -> str:
        return str(self._path)


def upload(
    folder: S3Folder, key: str, file: HeldFile, sha256: str, go_on: Callable[[], None] = lambda: None
) -> None:
    """Put `file` at `key`; on return it is there, read back and right.

    Args:
        go_on: called between pieces; raises where the rest is not wanted.

    Raises:
        NotWhole: `file` itself is not what `sha256` says.
        RuntimeError: it did not arrive.
    """
    for _ in range(UPLOAD_ATTEMPTS):
        _put(folder, key, file, go_on)
        for _ in range(2):  # it may be the way back that damages it
            if _digest_there(folder, key, file.num_bytes, go_on) == sha256:
                return
        if file.digest() != sha256:
            raise NotWhole(f"{file} is damaged: its SHA-256 is not the one it was saved with")
    raise RuntimeError(f"writing {folder.path_of(key)}: other bytes arrive than are sent")


def _put(folder: S3Folder, key: str, file: HeldFile, go_on: Callable[[], None]) -> None:
    piece_bytes = max(PIECE_BYTES, -(-file.num_bytes // MOST_PIECES))
    num_pieces = -(-file.num_bytes // piece_bytes)
    if num_pieces < 2:
        folder.write(key, file.read(0, file.num_bytes))
        return
    pieces = folder.create(key, piece_bytes)
    try:

        def put(number: int) -> None:
            go_on()
            pieces.put(number, file.read(number * piece_bytes, piece_bytes))

        for _ in InOrder(put, num_pieces):
            pass
        pieces.finish(num_pieces, file.num_bytes)
    except BaseException:
        with contextlib.suppress(Exception):
            pieces.abort()  # what stays is removed by the next writer
        raise


def _digest_there(folder: S3Folder, key: str, num_bytes: int, go_on: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    for piece in _pieces_of(folder, key, num_bytes, go_on):
        digest.update(piece)
    return digest.hexdigest()


def _pieces_of(
    folder: S3Folder, key: str, num_bytes: int, go_on: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    def read(number: int) -> bytes:
        go_on()
        offset = number * PIECE_BYTES
        return folder.read(key, offset, min(PIECE_BYTES, num_bytes - offset))

    return iter(InOrder(read, -(-num_bytes // PIECE_BYTES)))


def download(folder: S3Folder, key: str, path: Path, num_bytes: int, sha256: str) -> None:
    """Bring the object at `key` to `path`, which appears whole and durable or not at all.

    Raises:
        NotWhole: there are other bytes than `sha256` tells of; a second attempt gave no others.
        FileNotFoundError: there is no such object.
        RuntimeError: S3 cannot be read.
        OSError: the disk cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        for _ in range(2):
            digest = hashlib.sha256()
            with partial.open("wb") as file:
                for piece in _pieces_of(folder, key, num_bytes):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() == sha256:
                partial.replace(path)
                sync_folder(path.parent)
                return
    finally:
        partial.unlink(missing_ok=True)
    raise NotWhole(f"{folder.path_of(key)} is damaged: its SHA-256 is not the one it was saved with")


class InOrder(Generic[Result]):
    """Iterates over action(0), action(1), …, of which the next few are done meanwhile, in threads.

    In daemon threads, since those of an executor would keep a process alive that waits for S3. The iteration
    ends when all of them have.
    """

    def __init__(self, action: Callable[[int], Result], count: int, threads: int = THREADS) -> None:
        self._action, self._count, self._threads = action, count, min(threads, count)
        self._begun = self._taken = 0
        self._done: dict[int, tuple[Result | None, BaseException | None]] = {}
        self._turn = threading.Condition()

    def __iter__(self) -> Iterator[Result]:
        threads = [
            threading.Thread(target=self._work, name="mirror transfer", daemon=True)
            for _ in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            for number in range(self._count):
                yield self._result(number)
        finally:
            with self._turn:
                self._count = 0
                self._turn.notify_all()
            for thread in threads:
                thread.join()

    def _result(self, number: int) -> Any:
        with self._turn:
            self._turn.wait_for(lambda: number in self._done)
            result, error = self._done.pop(number)
            self._taken += 1
            self._turn.notify_all()
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(
                    lambda: self._begun >= self._count or self._begun < self._taken + self._threads
                )
                if self._begun >= self._count:
                    return
                number = self._begun
                self._begun += 1
            result, error = None, None
            try:
                result = self._action(number)
            except BaseException as problem:  # it is the caller's
                error = problem
            with self._turn:
                self._done[number] = result, error
                self._turn.notify_all()
