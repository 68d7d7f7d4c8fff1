"""The stored bytes of samples: read by id, checked against the index, replaced where they are damaged.

Bytes are read with `pread` into memory of our own rather than mapped: a shard that is cut short under a
running job gives a short read here, where a map would kill the process (SIGBUS). All ranks and workers of a
machine share the page cache all the same.
"""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.storage import crc32c
from train.data.augment import Augmentation

READ_AHEAD_BATCHES = 3  # announced to the kernel, which reads them from the disk side by side


class NothingIntactError(RuntimeError):
    """So much is damaged that nothing was found to put in its place."""


class Damage(NamedTuple):
    """A sample that cannot be used, and why."""

    sample_id: int
    reason: str


@dataclass(frozen=True)
class Request:
    """What is to be decoded for one batch.

    Attributes:
        epoch: from which crops, flips and replacements were drawn.
        sample_ids: int64, shape (n,).
        boxes: int32, shape (n, 4): top, left, height, width in pixels of the stored image.
        flips: bool, shape (n,).
        unchecked: bool, shape (n,): whose CRC-32C is to be compared with the index.
        resolution: side of the result in pixels.
    """

    epoch: int
    sample_ids: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    unchecked: np.ndarray
    resolution: int


@dataclass(frozen=True)
class Fetched:
    """A request with the bytes of its samples, all of them intact.

    Attributes:
        request: as it came, but damaged samples are replaced (training) or left out (validation).
        jpegs: a file for each of its samples.
        damaged: what was replaced or left out.
        changed_shards: ordinals of shards that are not the files any more that the loader was built on.
    """

    request: Request
    jpegs: list[bytes]
    damaged: tuple[Damage, ...] = ()
    changed_shards: tuple[int, ...] = ()


class SampleReader:
    """Reads samples of one split by id; may be pickled into worker processes.

    Args:
        paths: the split's shards.
        index: its rows, see `data_prep.manifest.INDEX_DTYPE`.
    """

    def __init__(self, paths: Sequence[Path], index: np.ndarray) -> None:
        self.paths = [Path(path) for path in paths]
        self.index = index
        self._position = np.full(1, -1)
        self._states = [_state(path.stat()) for path in self.paths]
        self._files: list[io.FileIO] | None = self._open()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": None}  # opened again where they are needed

    @property
    def num_samples(self) -> int:
        return len(self.index)

    @property
    def position(self) -> int:
        """The sample that is being read, or -1: a watchdog looks here."""
        return int(self._position[0])

    def report_to(self, position: np.ndarray) -> None:
        """Write the position into this array, which another process may see; int64, shape (1,)."""
        self._position = position

    def read(self, sample_id: int) -> bytes:
        """The stored bytes of one sample; fewer where the shard ends early."""
        row = self.index[sample_id]
        self._position[0] = sample_id
        try:
            return os.pread(self._file(row["shard"]), int(row["length"]), int(row["offset"]))
        finally:
            self._position[0] = -1

    def fault(self, sample_id: int, content: bytes | OSError, check: bool) -> str | None:
        """Why these bytes are not the sample that was prepared, or None."""
        row = self.index[sample_id]
        if isinstance(content, OSError):
            return f"the disk cannot read it ({os.strerror(content.errno or 0)})"
        if len(content) != row["length"]:
            return f"its shard ends early ({len(content)} of {row['length']} bytes are there)"
        if check and crc32c(content) != row["crc32c"]:
            return "its bytes are not those that were prepared (CRC-32C differs)"
        return None

    def has_changed(self, shard: int) -> bool:
        """Whether a shard is another file, or was written to, since the loader was built."""
        try:
            # Both: of a file that was replaced by renaming, the open one stays as it was.
            states = [_state(os.fstat(self._file(shard))), _state(self.paths[shard].stat())]
        except OSError:
            return True
        return states != [self._states[shard]] * 2

    def will_need(self, sample_ids: np.ndarray) -> None:
        """Tell the kernel what will be read soon, so that the disk is busy with all of it at once."""
        for row in self.index[sample_ids]:
            file = self._file(row["shard"])
            os.posix_fadvise(file, int(row["offset"]), int(row["length"]), os.POSIX_FADV_WILLNEED)

    def _open(self) -> list[io.FileIO]:
        # A large set has more shards than many systems let a process open by default.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Objects rather than numbers: they are closed with a reader that nobody closes.
        return [path.open("rb", buffering=0) for path in self.paths]

    def _file(self, shard: int) -> int:
        if self._files is None:
            self._files = self._open()
        return self._files[shard].fileno()

    def close(self) -> None:
        for file in self._files or []:
            file.close()
        self._files = []


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class SampleFetcher:
    """Turns requests into bytes that are surely those that were prepared.

    Args:
        sample_ids: what may take a damaged sample's place, int64, shape (n,).
    """

    def __init__(self, reader: SampleReader, augmentation: Augmentation, sample_ids: np.ndarray) -> None:
        self.reader = reader
        self._augmentation = augmentation
        self._sample_ids = sample_ids

    def fetch(self, request: Request) -> Fetched:
        """Read a request's samples; damaged ones are replaced (training) or left out (validation).

        Raises:
            RuntimeError: nothing intact was found to put in place of a damaged sample.
        """
        reader, ids = self.reader, request.sample_ids
        contents = [self._read(sample_id) for sample_id in ids]
        # After the reading: had a shard changed before, its bytes are suspicious now, checked once or not.
        changed = [int(shard) for shard in np.unique(reader.index["shard"][ids]) if reader.has_changed(shard)]
        check = request.unchecked
        if changed:
            check = check | np.isin(reader.index["shard"][ids], changed)
        faults = {
            position: fault
            for position, (sample_id, content) in enumerate(zip(ids, contents, strict=True))
            if (fault := reader.fault(sample_id, content, bool(check[position])))
        }
        return self.mend(Fetched(request, contents, (), tuple(changed)), faults)  # type: ignore[arg-type]

    def fetch_all(self, requests: Iterator[Request]) -> Iterator[Fetched]:
        """Fetch one after the other; what comes next is being read from the disk meanwhile."""
        ahead: list[Request] = []
        for request in requests:
            self.reader.will_need(request.sample_ids)
            ahead.append(request)
            if len(ahead) > READ_AHEAD_BATCHES:
                yield self.fetch(ahead.pop(0))
        for request in ahead:
            yield self.fetch(request)

    def mend(self, fetched: Fetched, faults: dict[int, str]) -> Fetched:
        """Replace or leave out the samples at these positions, each with its fault."""
        if not faults:
            return fetched
        request, jpegs = fetched.request, list(fetched.jpegs)
        damaged = tuple(
            Damage(int(request.sample_ids[position]), fault) for position, fault in faults.items()
        )
        damaged = fetched.damaged + damaged
        if not self._augmentation.is_random:
            kept = np.array([position not in faults for position in range(len(jpegs))], bool)
            jpegs = [jpeg for jpeg, keep in zip(jpegs, kept, strict=True) if keep]
            request = _with(request, lambda array: array[kept])
            return Fetched(request, jpegs, damaged, fetched.changed_shards)
        request = _with(request, np.copy)
        for position, fault in faults.items():
            sample_id, jpegs[position] = self._replacement(request, position, fault)
            row = self.reader.index[sample_id : sample_id + 1]
            boxes, flips = self._augmentation.boxes_and_flips(
                request.epoch, np.array([sample_id]), row["width"], row["height"]
            )
            request.sample_ids[position] = sample_id
            request.boxes[position], request.flips[position] = boxes[0], flips[0]
        return Fetched(request, jpegs, damaged, fetched.changed_shards)

    def _replacement(self, request: Request, position: int, fault: str) -> tuple[int, bytes]:
        reader, damaged_id = self.reader, int(request.sample_ids[position])
        places = self._augmentation.replacements(request.epoch, damaged_id, len(self._sample_ids))
        candidates = self._sample_ids[places]
        for candidate in candidates.tolist():
            content = self._read(candidate)
            if candidate != damaged_id and reader.fault(candidate, content, check=True) is None:
                return candidate, content  # type: ignore[return-value]
        raise NothingIntactError(
            f"sample {damaged_id} is damaged: {fault}; so are {len(candidates)} others that were drawn in "
            f"its place: copy the data set at {reader.paths[0].parent} again, or prepare it again"
        )

    def _read(self, sample_id: int) -> bytes | OSError:
        try:
            return self.reader.read(sample_id)
        except OSError as error:  # of a failing disk
            return error


def _with(request: Request, change: Callable[[np.ndarray], np.ndarray]) -> Request:
    return replace(
        request,
        sample_ids=change(request.sample_ids),
        boxes=change(request.boxes),
        flips=change(request.flips),
        unchecked=change(request.unchecked),
    )
