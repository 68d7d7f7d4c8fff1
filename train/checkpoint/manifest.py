"""The list of a run's checkpoints: which files count, in which order, under which names."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_prep.manifest import FileName


class CheckpointEntry(BaseModel):
    """A checkpoint that was written whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FileName
    step: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class CheckpointManifest(BaseModel):
    """`checkpoints/manifest.json`: the kept checkpoints, oldest first, and the best one's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoints: tuple[CheckpointEntry, ...] = ()
    best: FileName | None = None

    def entry(self, name: str | None) -> CheckpointEntry | None:
        return next((entry for entry in self.checkpoints if entry.name == name), None)


def order_of(path: Path) -> tuple[int, int]:
    """Step and number of `step-00000560-2.pt`; (-1, 0) for another name."""
    match = re.fullmatch(r"step-(\d+)(?:-(\d+))?\.pt", path.name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def free_name(manifest: CheckpointManifest, step: int) -> str:
    """`step-00000560.pt`, or `-2` where one of the same step is named already: before a validation, say."""
    names = (f"step-{step:08d}{f'-{number}' if number > 1 else ''}.pt" for number in itertools.count(1))
    return next(name for name in names if manifest.entry(name) is None)


def pruned(manifest: CheckpointManifest, keep_last: int) -> CheckpointManifest:
    last = manifest.checkpoints[-keep_last:]
    kept = [entry for entry in manifest.checkpoints if entry in last or entry.name == manifest.best]
    return CheckpointManifest(checkpoints=tuple(kept), best=manifest.best)
