"""Going on from a mirror: the newest state of a run, brought to a folder that has none, or an older one.

Files are written first and the manifest last, each of them whole or not at all: so a machine that dies in the
middle leaves nothing that looks finished, and the next start brings what is missing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.storage import sha256_file, write_atomically
from train.checkpoint.manifest import CheckpointManifest
from train.checkpoint.mirror_listing import (
    LATEST_NAME,
    MOST_LISTING_BYTES,
    Latest,
    MirroredCheckpoint,
    MirroredFile,
    parse_latest,
)
from train.checkpoint.store import MANIFEST_NAME, CheckpointStore
from train.checkpoint.transfer import NotWhole, download

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

ROUNDS = 5  # another writer may move `latest.json`, and delete what it named, while it is read


class DiskFault(RuntimeError):
    """The folder to restore to cannot be written."""


class _Moved(Exception):
    """What `latest.json` names went away with it."""


class Restoring:
    """One attempt to bring a mirror's state to `folder`.

    Attributes:
        local_step: of the newest checkpoint in `folder`; -1 for none.
        seen_step: of the mirror's newest checkpoint, once it was read.
        damaged: keys of the objects that are missing, or not what they should be.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any]) -> None:
        self._folder, self._checkpoints, self._say = folder, folder / "checkpoints", say
        self.seen_step = -1
        self.damaged: set[str] = set()
        self._manifest = self._local_manifest()
        self.local_step = max(
            [entry.step for entry in self._manifest.checkpoints]
            or [_step_of(path) for path in self._checkpoints.glob("step-*.pt")],
            default=-1,
        )

    def _local_manifest(self) -> CheckpointManifest:
        """Without entries whose file is missing or cut short; empty where it is damaged."""
        try:
            manifest = CheckpointStore(self._checkpoints).manifest()
        except ValueError:
            return CheckpointManifest()
        entries = [
            entry
            for entry in manifest.checkpoints
            if (path := self._checkpoints / entry.name).is_file() and path.stat().st_size == entry.bytes
        ]
        return CheckpointManifest(checkpoints=tuple(entries), best=manifest.best)

    def run(self, s3: S3Folder) -> int | None:
        """See `CheckpointMirror.restore`."""
        for _ in range(ROUNDS):
            try:
                content, etag = s3.read_with_etag(LATEST_NAME, MOST_LISTING_BYTES)
            except FileNotFoundError:
                return None
            latest = parse_latest(content, s3.path_of(LATEST_NAME))
            try:
                step = self._bring(s3, latest, etag)
            except _Moved:
                continue
            except OSError as error:
                raise DiskFault(
                    f"{self._folder} cannot be written to ({error.strerror or error}): the run cannot be "
                    f"brought there from {s3.location}"
                ) from None
            self.seen_step = -1 if latest.step is None else latest.step
            return step
        raise RuntimeError(f"{s3.location} is written to faster than it can be read: end the other process")

    def _bring(self, s3: S3Folder, latest: Latest, etag: str) -> int | None:
        def is_newer(step: int) -> bool:
            # Without a manifest, files of the same step are those of a restore that died.
            return step > self.local_step or (step == self.local_step and not self._manifest.checkpoints)

        candidates = [item for item in reversed(latest.checkpoints) if is_newer(item.step)]
        if not candidates:
            return None
        self._check_space(candidates[:1] + [item for item in latest.checkpoints if item.name == latest.best])
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        newest = next((item for item in candidates if self._has(s3, item, etag)), None)
        if newest is None:
            raise ValueError(f"none of the {len(candidates)} newest checkpoints in {s3.location} is whole")
        chosen = [newest]
        best = next((item for item in latest.checkpoints if item.name == latest.best), None)
        if best is not None and best != newest and best.key not in self.damaged and self._has(s3, best, etag):
            chosen.insert(0, best)
        for file in latest.files:
            self._bring_file(s3, file, etag)
        manifest = CheckpointManifest(
            checkpoints=tuple(item.entry for item in latest.checkpoints if item in chosen),
            best=latest.best if best in chosen else None,
        )
        self._announce(manifest)
        self._say(f"step {newest.step} was brought from {s3.location}")
        return newest.step

    def _has(self, s3: S3Folder, item: MirroredCheckpoint, etag: str) -> bool:
        """Whether this checkpoint is in the folder now; each one that cannot be had is named."""
        path = self._checkpoints / item.name
        if path.is_file() and path.stat().st_size == item.bytes and sha256_file(path) == item.sha256:
            return True
        others = tuple(entry for entry in self._manifest.checkpoints if entry.name != item.name)
        if others != self._manifest.checkpoints:
            # The file of that name is another run's: it must not be named while it is replaced.
            self._announce(self._manifest.model_copy(update={"checkpoints": others}))
        try:
            download(s3, item.key, path, item.bytes, item.sha256)
            return True
        except FileNotFoundError as error:
            if error.errno is not None:
                raise  # of the disk
            self._check_still(s3, etag)
            fault = f"{s3.path_of(item.key)} is missing"
        except NotWhole as error:
            self._check_still(s3, etag)
            fault = str(error)
        self.damaged.add(item.key)
        self._say(f"warning: checkpoint {item.name} in the mirror: {fault}")
        return False

    def _bring_file(self, s3: S3Folder, file: MirroredFile, etag: str) -> None:
        for _ in range(2):  # it may be the way here that damages it
            try:
                content = s3.read(file.key, 0, file.bytes)
            except FileNotFoundError:
                break
            if hashlib.sha256(content).hexdigest() == file.sha256:
                write_atomically(self._folder / file.name, content)
                return
        self._check_still(s3, etag)
        self.damaged.add(file.key)
        self._say(f"warning: {s3.path_of(file.key)} is missing or damaged; going on without {file.name}")

    def _check_still(self, s3: S3Folder, etag: str) -> None:
        """Raise _Moved where `latest.json` is another one by now."""
        try:
            now = s3.read_with_etag(LATEST_NAME, MOST_LISTING_BYTES)[1]
        except FileNotFoundError:
            now = ""
        if now != etag:
            raise _Moved

    def _check_space(self, wanted: list[MirroredCheckpoint]) -> None:
        needed = sum({item.key: item.bytes for item in wanted}.values())
        parent = self._folder
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise DiskFault(
                f"{self._folder} has {free / 1e9:.1f} GB free, and the checkpoints in the mirror take "
                f"{needed / 1e9:.1f} GB: free some space"
            )

    def _announce(self, manifest: CheckpointManifest) -> None:
        content = manifest.model_dump_json(indent=2) + "\n"
        write_atomically(self._checkpoints / MANIFEST_NAME, content.encode())
        self._manifest = manifest


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)(?:-\d+)?\.pt", path.name)
    return int(match[1]) if match else -1
