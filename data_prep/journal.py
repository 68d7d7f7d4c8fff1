"""What `prepare` has finished so far, kept beside the shards in `.prepare/` until the manifest stands.

A record a piece of work: a tar shard, or some pages of a `.beton`. It is written after its bytes are durable,
so whatever dies, a later start finds records and bytes that belong together, checks them, and goes on. Each
file begins with the CRC-32C of the rest: a damaged one counts as missing, and its work is done again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.manifest import INDEX_DTYPE, FileEntry
from data_prep.normalize import NormalizedImage
from data_prep.plain_json import parse_json
from data_prep.storage import Folder, LocalFolder, crc32c

FOLDER = ".prepare"
NAMES = r"(train|val|rank)-\d+|plan|claim|meeting|stopped"
OURS = re.compile(rf"{re.escape(FOLDER)}/\.?({NAMES})\.json(\.partial)?")


class Record(BaseModel):
    """Samples `start` to `stop` of a split's order, and where they went.

    Attributes:
        run: the start of `prepare` that wrote it, or checked it last.
        rows: of the index (INDEX_DTYPE), base64; offsets are those in the shard.
        files: finished files (a tar and its .idx); () for pages of a `.beton`.
        piece_crcs: CRC-32C of the pieces of a `.beton`, from piece `number` on.
        token: of the unfinished file these pieces belong to.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    run: str
    number: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    rows: str = ""
    quarantined: list[dict[str, str]] = []
    channel_sum: tuple[float, float, float] = (0.0, 0.0, 0.0)
    channel_square_sum: tuple[float, float, float] = (0.0, 0.0, 0.0)
    num_statistics: int = 0
    files: tuple[FileEntry, ...] = ()
    piece_crcs: tuple[int, ...] = ()
    token: str = ""

    @property
    def index(self) -> np.ndarray:
        """Array of INDEX_DTYPE, a row a prepared sample."""
        return np.frombuffer(base64.b64decode(self.rows), INDEX_DTYPE)


class RecordBuilder:
    """Collects samples until a piece of work is done."""

    def __init__(self, split: str, start: int) -> None:
        self.split, self.start, self.stop = split, start, start
        self.quarantined: list[dict[str, str]] = []
        self._rows: list[tuple[int, ...]] = []
        self._sums = np.zeros((2, 3))
        self._num_statistics = 0

    def add(self, image: NormalizedImage, offset: int, label: int, shard: int) -> None:
        """A sample that was written at `offset` of its shard."""
        jpeg = image.jpeg
        self._rows.append((offset, len(jpeg), crc32c(jpeg), label, shard, image.width, image.height))
        if image.channel_means is not None:
            self._sums += image.channel_means
            self._num_statistics += 1
        self.stop += 1

    def reject(self, key: str, reason: str) -> None:
        """A file that could not be used."""
        self.quarantined.append({"split": self.split, "key": key, "reason": reason})
        self.stop += 1

    def build(self, fingerprint: str, run: str, number: int, **fields: object) -> Record:
        rows = np.array(self._rows, INDEX_DTYPE)
        sums, squares = (tuple(row.tolist()) for row in self._sums)
        return Record(
            fingerprint=fingerprint,
            run=run,
            number=number,
            start=self.start,
            stop=self.stop,
            rows=base64.b64encode(rows.tobytes()).decode(),
            quarantined=self.quarantined,
            channel_sum=sums,
            channel_square_sum=squares,
            num_statistics=self._num_statistics,
            **fields,  # type: ignore[arg-type]
        )


class Journal:
    """The records of one fingerprint in a folder or bucket."""

    def __init__(self, folder: Folder, fingerprint: str, run: str) -> None:
        self.folder, self.fingerprint, self.run = folder, fingerprint, run
        # By file name: its version when it was read, and what it held for this fingerprint.
        self._read: dict[str, tuple[str, Record | None]] = {}

    def save(self, split: str, record: Record) -> None:
        self.folder.write(_name(split, record.number), _sealed(record.model_dump_json()))

    def load(self, split: str) -> dict[int, Record]:
        """Records of a split by number; damaged ones, and those of other settings, do not exist."""
        return self.load_all((split,))[split]

    def load_all(self, splits: Iterable[str]) -> dict[str, dict[int, Record]]:
        """As `load`, for several splits with one listing; only what is new or changed is read."""
        records: dict[str, dict[int, Record]] = {split: {} for split in splits}
        for file in self.folder.files(FOLDER):
            split = file.name.removeprefix(f"{FOLDER}/").partition("-")[0]
            if split not in records:
                continue
            version, record = self._read.get(file.name, ("", None))
            if version != file.version:
                record = self._record(split, file.name)
                self._read[file.name] = (file.version, record)
            if record is not None:
                records[split][record.number] = record
        return records

    def _record(self, split: str, name: str) -> Record | None:
        try:
            record = Record.model_validate_json(_opened(self.folder.read(name)))
        except (ValidationError, ValueError, FileNotFoundError):
            return None
        same = record.fingerprint == self.fingerprint and name == _name(split, record.number)
        return record if same else None

    def save_note(self, name: str, content: dict[str, object]) -> None:
        """A small JSON file beside the records."""
        self.folder.write(f"{FOLDER}/{name}.json", _sealed(json.dumps(content)))

    def load_note(self, name: str) -> dict[str, object]:
        """Its content; {} where it is missing or damaged."""
        try:
            content = parse_json(_opened(self.folder.read(f"{FOLDER}/{name}.json")))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def clear(self) -> None:
        """Remove all of ours: the manifest stands."""
        for file in self.folder.files(FOLDER):
            if OURS.fullmatch(file.name):
                self.folder.delete(file.name)
        if isinstance(self.folder, LocalFolder):
            with contextlib.suppress(OSError):  # somebody has put something there
                (self.folder.path / FOLDER).rmdir()


def _sealed(text: str) -> bytes:
    content = text.encode()
    return b"%08x\n" % crc32c(content) + content


def _opened(content: bytes) -> bytes:
    """ValueError: damaged."""
    checksum, _, text = content.partition(b"\n")
    if checksum != b"%08x" % crc32c(text):
        raise ValueError("its checksum differs")
    return text


def _name(split: str, number: int) -> str:
    return f"{FOLDER}/{split}-{number:06d}.json"
