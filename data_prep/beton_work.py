"""A split as one `.beton`, written piece by piece, each journaled, so that a later start goes on after it.

A piece is some pages (8 MiB each). On a disk the pieces fill a hidden partial file; in S3 they are the parts
of one multipart upload. The front of the file (header and metadata) comes last.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data_prep.journal import Record, RecordBuilder
from data_prep.manifest import FileEntry
from data_prep.normalize import NormalizedImage
from data_prep.progress import progress_bar
from data_prep.sources import Sample
from data_prep.storage import PiecewiseFile, crc32c, stream
from data_prep.work import Work
from data_prep.writers.beton import PAGE_BYTES, BetonLayout

PIECES_IN_FLIGHT = 2  # being stored while the next one fills; memory: one more piece than these
EXPECTED_SAMPLE_BYTES = 128 << 10  # only decides how large pieces are
MAX_PIECES = 4000  # S3 allows 10,000 parts


def piece_bytes_for(num_samples: int) -> int:
    """Piece size in bytes: one page for small splits, more where there would be too many pieces."""
    pages = num_samples * EXPECTED_SAMPLE_BYTES / PAGE_BYTES / MAX_PIECES
    return PAGE_BYTES * (1 << max(0, int(np.ceil(np.log2(pages))))) if pages > 1 else PAGE_BYTES


def write_beton(work: Work, split: str, order: list[Sample]) -> tuple[list[Record], FileEntry]:
    """Write `<split>.beton`; returns its records in order, and the file.

    Raises:
        ValueError: too many bad files.
        RuntimeError: the bytes cannot be stored, or came back wrong.
    """
    name = f"{split}.beton"
    piece_bytes = piece_bytes_for(len(order))
    layout = BetonLayout(capacity=len(order), align_bytes=piece_bytes)
    known = _in_a_row(work.journal.load(split), layout.data_start // piece_bytes)
    if known and known[-1].stop == len(order):
        entry = _checked(work, name, layout, known)
        if entry is not None:
            print(f"split {split}: kept from the interrupted run", file=sys.stderr)
            for record in known:
                work.bad_files.add(record.quarantined)
            return known, entry
    # The record of the last pieces is of use only together with the finished file.
    known = [record for record in known if record.stop < len(order)]
    file, kept = _open(work, name, piece_bytes, known)
    for record in kept:
        work.bad_files.add(record.quarantined)
    try:
        if kept:
            print(
                f"split {split}: {kept[-1].stop:,} of {len(order):,} images kept from the interrupted run",
                file=sys.stderr,
            )
        filler = _Filler(work, split, file, layout, piece_bytes, kept)
        records = filler.fill(order)
    finally:
        file.close()
    entry = _checked(work, name, layout, records)
    if entry is None:
        raise RuntimeError(
            f"{work.folder.path_of(name)} came back with other bytes than were written: check the disk, and "
            "run the same command again"
        )
    return records, entry


def _in_a_row(records: dict[int, Record], first: int) -> list[Record]:
    """The records from piece `first` on, as far as none is missing."""
    row: list[Record] = []
    while (record := records.get(first + len(row))) is not None:
        if record.start != (row[-1].stop if row else 0):
            break
        row.append(record)
    return row


def _open(work: Work, name: str, piece_bytes: int, known: list[Record]) -> tuple[PiecewiseFile, list[Record]]:
    """The unfinished file with the records whose pieces are truly in it, or a new one."""
    if known:
        file = work.folder.create(name, piece_bytes, known[0].token)
        try:
            durable = file.durable_pieces()
        except FileNotFoundError:  # that upload was removed meanwhile
            durable = set()
        kept: list[Record] = []
        for record in known:
            if record.token != known[0].token or record.number not in durable:
                break
            piece = file.read_piece(record.number, piece_bytes)
            if piece is not None and crc32c(piece) != record.piece_crcs[0]:
                break
            kept.append(record)
        if kept:
            return file, kept
        file.close()
    work.folder.abort_unfinished(name)
    return work.folder.create(name, piece_bytes), []


class _Filler:
    """Fills pieces with images, in order, and stores each with its record."""

    def __init__(
        self,
        work: Work,
        split: str,
        file: PiecewiseFile,
        layout: BetonLayout,
        piece_bytes: int,
        kept: list[Record],
    ) -> None:
        self._work, self._split, self._file, self._layout = work, split, file, layout
        self._piece_bytes = piece_bytes
        self._records = list(kept)
        self._number = layout.data_start // piece_bytes + len(kept)  # of the piece that fills now
        layout.position = self._number * piece_bytes
        self._start = kept[-1].stop if kept else 0
        self._buffer = bytearray(piece_bytes)
        self._pool = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="beton")
        self._pending: deque[Future[None]] = deque()

    def fill(self, order: list[Sample]) -> list[Record]:
        work, split = self._work, self._split
        builder = RecordBuilder(split, self._start)
        try:
            with progress_bar(len(order), f"prepare {split}", work.options.progress, self._start) as bar:
                ranges = [(split, self._start, len(order))]
                for _, sample, result in work.normalized(ranges, {split: order}):
                    bar.update()
                    if isinstance(result, NormalizedImage) and len(result.jpeg) > self._layout.page_bytes:
                        limit = self._layout.page_bytes >> 20
                        result = f"stored image larger than {limit} MiB: set --resolution-cap"
                    if isinstance(result, str):
                        builder.reject(sample.key, result)
                        work.bad_files.add(builder.quarantined[-1:])
                        continue
                    offset = self._layout.place(len(result.jpeg))
                    if offset >= (self._number + 1) * self._piece_bytes:
                        self._store(bytes(self._buffer), builder)
                        builder = RecordBuilder(split, builder.stop)
                    inside = offset - self._number * self._piece_bytes
                    self._buffer[inside : inside + len(result.jpeg)] = result.jpeg
                    builder.add(result, offset, sample.label, shard=0)
            self._finish(builder)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        return self._records

    def _store(self, piece: bytes, builder: RecordBuilder) -> None:
        """Store the full piece in the background, then its record."""
        self._work.still_ours()
        number, journal = self._number, self._work.journal
        record = builder.build(
            journal.fingerprint, journal.run, number, piece_crcs=(crc32c(piece),), token=self._file.token
        )
        self._records.append(record)

        def store() -> None:
            self._file.put(number, piece)
            journal.save(self._split, record)

        self._pending.append(self._pool.submit(store))
        while len(self._pending) > PIECES_IN_FLIGHT:
            self._pending.popleft().result()
        self._number += 1
        self._buffer = bytearray(self._piece_bytes)

    def _finish(self, builder: RecordBuilder) -> None:
        """The last pieces with the allocation table, then the front, then the name."""
        journal, size = self._work.journal, self._piece_bytes
        provisional = builder.build(journal.fingerprint, journal.run, self._number)
        index = np.concatenate([record.index for record in (*self._records, provisional)])
        head, table_start, table = self._layout.tables(index)
        used = self._layout.position - self._number * size
        padding = table_start - self._layout.position
        tail = bytes(self._buffer[:used]) + bytes(padding) + table
        pieces = [tail[i : i + size] for i in range(0, len(tail), size)]
        while self._pending:
            self._pending.popleft().result()
        for offset, piece in enumerate(pieces):
            self._file.put(self._number + offset, piece)
        for number in range(len(head) // size):
            self._file.put(number, head[number * size : (number + 1) * size])
        # Before the file has its name, so that a start after a crash in between finds all of it.
        last = provisional.model_copy(
            update={"piece_crcs": tuple(crc32c(piece) for piece in pieces), "token": self._file.token}
        )
        journal.save(self._split, last)
        self._records.append(last)
        self._work.still_ours()
        self._file.finish(self._number + len(pieces), table_start + len(table))


def _checked(work: Work, name: str, layout: BetonLayout, records: list[Record]) -> FileEntry | None:
    """The finished file, read back and compared piece by piece with what was written; None if it differs."""
    index = np.concatenate([record.index for record in records])
    # After the last image: the layout may come fresh, with nothing placed yet.
    layout.position = int(index["offset"][-1] + index["length"][-1]) if len(index) else layout.data_start
    head, table_start, table = layout.tables(index)
    num_bytes = table_start + len(table)
    info = work.folder.info(name)
    if info is None or info.num_bytes != num_bytes:
        return None
    piece_bytes = piece_bytes_for(layout.capacity)
    expected = [crc32c(head[i : i + piece_bytes]) for i in range(0, len(head), piece_bytes)]
    expected += [crc for record in records for crc in record.piece_crcs]
    del index, head, table  # a hundred bytes an image, while the file is read
    digest = hashlib.sha256()
    for number, piece in enumerate(stream(work.folder, name, num_bytes, piece_bytes)):
        if number >= len(expected) or crc32c(piece) != expected[number]:
            return None
        digest.update(piece)
    return FileEntry(name=name, bytes=num_bytes, sha256=digest.hexdigest())
