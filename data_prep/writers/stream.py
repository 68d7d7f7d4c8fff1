"""A file written from front to back, its pieces stored in the background, its SHA-256 known at the end.

Example:
    >>> with StreamWriter(open_folder("s3://bucket/data"), "train-00000.tar") as stream:
    ...     stream.write(b"...")
    ...     entry = stream.finish()
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from data_prep.manifest import FileEntry
from data_prep.storage import Folder, LocalFolder, sha256_of

PIECE_BYTES = 16 << 20
PIECES_IN_FLIGHT = 4  # memory: one more than these


class StreamWriter:
    """Append bytes to a new file of a folder or bucket; nobody sees it under its name before `finish`."""

    def __init__(self, folder: Folder, name: str, piece_bytes: int = PIECE_BYTES) -> None:
        self.position = 0
        self._folder, self._name, self._piece_bytes = folder, name, piece_bytes
        self._file = folder.create(name, piece_bytes)
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._num_pieces = 0
        self._pool = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="stream-writer")
        self._pending: deque[Future[None]] = deque()
        self._finished = False

    def write(self, content: bytes) -> None:
        """Append. RuntimeError: an earlier piece could not be stored."""
        self._buffer += content
        self.position += len(content)
        while len(self._buffer) >= self._piece_bytes:
            self._put(bytes(self._buffer[: self._piece_bytes]))
            del self._buffer[: self._piece_bytes]

    def finish(self) -> FileEntry:
        """Store the rest and give the file its name. A file in S3 is read back and compared.

        Raises:
            RuntimeError: what came back is not what was written.
        """
        if self._buffer or not self._num_pieces:
            self._put(bytes(self._buffer))
            self._buffer.clear()
        while self._pending:
            self._pending.popleft().result()
        self._file.finish(self._num_pieces, self.position)
        self._finished = True
        digest = self._digest.hexdigest()
        if not isinstance(self._folder, LocalFolder):
            # The local disk is trusted until verify; what went over a network is looked at once more.
            read_back = sha256_of(self._folder, self._name, self.position)
            if read_back != digest:
                self._folder.delete(self._name)
                raise RuntimeError(
                    f"{self._folder.path_of(self._name)} came back with other bytes than were written and "
                    "was removed: run the same command again"
                )
        return FileEntry(name=self._name, bytes=self.position, sha256=digest)

    def _put(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._pending.append(self._pool.submit(self._file.put, self._num_pieces, piece))
        self._num_pieces += 1
        while len(self._pending) > PIECES_IN_FLIGHT:
            self._pending.popleft().result()

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._finished:
            self._file.close()
        else:
            # Where S3 has failed, this fails too: what remains is removed when this name is written again.
            with contextlib.suppress(RuntimeError):
                self._file.abort()
