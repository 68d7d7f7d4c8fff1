"""`latest.json` of a mirror: which objects make up the newest state of a run, and whose turn it is to write.

    latest.json                                        moved by a conditional write, after all that it names
    checkpoints/step-00000560-<sha>-<writer>-<n>.pt    a checkpoint; no key is ever used for two uploads
    files/metrics.jsonl-<sha>-<writer>-<n>             a file of the run folder

It may come from anybody, so nothing in it can name a place outside the run folder or the mirror.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.manifest import FileName
from train.checkpoint.manifest import CheckpointEntry, CheckpointManifest

LATEST_NAME = "latest.json"
MOST_LISTING_BYTES = 4 << 20
MOST_CHECKPOINT_BYTES = 1 << 40
MOST_FILE_BYTES = 1 << 30

# What a run needs to go on elsewhere, besides its checkpoints; `best.*` follow from these.
RESUME_FILES = (
    "recipe.yaml",
    "metrics.jsonl",
    "lr_finder.json",
    "lr_finder.png",
    "micro_batch.json",
    "damaged.jsonl",
    "mlflow.json",
    "fork.json",
)
FOLDERS = ("checkpoints", "files")
KEY = re.compile(r"(?:checkpoints|files)/[A-Za-z0-9][A-Za-z0-9._-]{0,250}")

Key = Annotated[str, Field(pattern=rf"^{KEY.pattern}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class MirroredFile(BaseModel):
    """An object that was uploaded whole and read back; `name` is its own in the run folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    key: Key
    sha256: Sha256
    bytes: int = Field(ge=0, le=MOST_FILE_BYTES)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in RESUME_FILES:
            raise ValueError(f"{name[:50]!r} is no file that a run needs")
        return name


class MirroredCheckpoint(BaseModel):
    """As `MirroredFile`, of a checkpoint of `step`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^step-[0-9]{1,12}(-[0-9]{1,6})?\.pt$")]
    key: Key
    step: int = Field(ge=0)
    sha256: Sha256
    bytes: int = Field(ge=0, le=MOST_CHECKPOINT_BYTES)

    @property
    def entry(self) -> CheckpointEntry:
        return CheckpointEntry(name=self.name, step=self.step, sha256=self.sha256, bytes=self.bytes)


class Latest(BaseModel):
    """The contents of `latest.json`.

    Attributes:
        writer: who may move it: the last one that took it over.
        sequence: grows with every write, so that no two contents are equal.
        step: of the newest checkpoint; None for a run that has none yet.
        checkpoints: oldest first, as in the store's manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    writer: str = Field(pattern=r"^[0-9a-f]{32}$")
    sequence: int = Field(ge=0)
    run: str = Field(max_length=255)
    step: int | None = Field(default=None, ge=0)
    checkpoints: tuple[MirroredCheckpoint, ...] = Field(default=(), max_length=1000)
    best: FileName | None = None
    files: tuple[MirroredFile, ...] = Field(default=(), max_length=len(RESUME_FILES))

    @model_validator(mode="after")
    def _is_consistent(self) -> Latest:
        names = [item.name for item in self.checkpoints]
        if len({*names}) < len(names) or len({item.name for item in self.files}) < len(self.files):
            raise ValueError("a name stands twice")
        if self.step != (self.checkpoints[-1].step if self.checkpoints else None):
            raise ValueError("step is not that of the last checkpoint")
        if self.best is not None and self.best not in names:
            raise ValueError("best is none of the checkpoints")
        return self

    @property
    def objects(self) -> tuple[MirroredCheckpoint | MirroredFile, ...]:
        return (*self.checkpoints, *self.files)

    @property
    def keys(self) -> set[str]:
        return {item.key for item in self.objects}

    @property
    def manifest(self) -> CheckpointManifest:
        return CheckpointManifest(checkpoints=tuple(c.entry for c in self.checkpoints), best=self.best)

    def encoded(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def parse_latest(content: bytes | None, where: str) -> Latest:
    """What a `latest.json` says; `content` is None where it is too large, or never arrives undamaged.

    Raises:
        ValueError: it is damaged, hostile, or of another version.
    """
    reason = f"it is damaged, or larger than {MOST_LISTING_BYTES >> 20} MiB"
    if content is not None:
        try:
            return Latest.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            reason = f"{place}: {first['msg']}"[:200]
    raise ValueError(
        f"{where} cannot be used ({reason}): choose another run.name or checkpoint.mirror, or delete it to "
        "give up that copy"
    )


def new_key(folder: str, name: str, sha256: str, writer: str, number: int) -> str:
    """Where an upload goes.

    The writer and its running number are in it: so no request of an earlier upload, however late it arrives,
    touches this one.
    """
    path, tail = PurePosixPath(name), f"{sha256[:12]}-{writer[:8]}-{number}"
    if folder == "checkpoints":
        return f"{folder}/{path.stem}-{tail}{path.suffix}"
    return f"{folder}/{name}-{tail}"
