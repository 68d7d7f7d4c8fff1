"""What one writer of a mirror does, step by step: take it over, upload, name what is there, delete the rest.

Nothing here may harm a writer that came later, at whatever time a request of this one arrives: `latest.json`
moves only on the condition that it is still ours, and no key is used for two uploads, by anybody.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.checkpoint.manifest import CheckpointManifest
from train.checkpoint.mirror_listing import (
    FOLDERS,
    KEY,
    LATEST_NAME,
    MOST_LISTING_BYTES,
    RESUME_FILES,
    Latest,
    MirroredCheckpoint,
    MirroredFile,
    new_key,
    parse_latest,
)
from train.checkpoint.transfer import HeldFile, NotWhole, upload

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

ROUNDS = 5  # of taking it over, where others do at the same moment; of a write that arrives damaged


class TakenOver(Exception):
    """Another writer has the mirror."""


class HeldBack(RuntimeError):
    """The mirror is further than this run, which has not been able to look at it when it began."""


@dataclass
class State:
    """What is to be in the mirror: the files of a run at one of its checkpoints, held open."""

    run: str
    checkpoints: list[HeldFile]  # oldest first
    best: str | None
    files: list[HeldFile]

    @classmethod
    def of(cls, folder: Path, manifest: CheckpointManifest) -> State:
        """Open all files of `folder` that belong to it. OSError: one of the checkpoints cannot be."""
        state = cls(folder.name, [], manifest.best, [])
        try:
            for entry in manifest.checkpoints:
                path = folder / "checkpoints" / entry.name
                state.checkpoints.append(HeldFile(path, entry.step, entry.sha256))
            for name in RESUME_FILES:
                with contextlib.suppress(FileNotFoundError):
                    state.files.append(HeldFile(folder / name))
        except BaseException:
            state.close()
            raise
        return state

    @property
    def step(self) -> int:
        return self.checkpoints[-1].step or 0

    def has(self, file: HeldFile) -> bool:
        """Whether this very checkpoint belongs to it."""
        return any((other.name, other.sha256) == (file.name, file.sha256) for other in self.checkpoints)

    def close(self) -> None:
        for file in (*self.checkpoints, *self.files):
            file.close()


class MirrorWriter:
    """A writer of the mirror in `folder`; used by one thread.

    Attributes:
        seen_step: how far the mirror was when this run compared it with its own folder.
        damaged: keys of objects that were found to be missing or damaged.
    """

    def __init__(self, folder: S3Folder, say: Callable[[str], Any]) -> None:
        self.seen_step = -1
        self.damaged: frozenset[str] = frozenset()
        self._folder, self._say = folder, say
        self._id = uuid.uuid4().hex
        self._latest: Latest | None = None  # what latest.json says since this writer has the mirror
        self._etag: str | None = None
        self._stored: dict[tuple[str, str], MirroredCheckpoint | MirroredFile] = {}  # by name and SHA-256
        self._keys: dict[tuple[str, str], str] = {}  # of uploads that were begun
        self._num_keys = 0
        self._unnamed: set[str] = set()  # keys to be deleted

    def take_over(self, state: State | None) -> None:
        """Become the writer; nothing where it is the writer already. `state`: what it has to upload, if any.

        Raises:
            TakenOver: it was the writer, and another one is now.
            HeldBack: the mirror is further than this run.
            RuntimeError: S3 does not do it.
        """
        if self._latest is not None:
            return self._check_still_ours()
        for _ in range(ROUNDS):
            found, etag = self._read_latest()
            there = -1 if found is None or found.step is None else found.step
            if there > max(self.seen_step, state.step if state else -1):
                raise HeldBack(f"it holds step {there}, and this run is not that far: it is left as it is")
            if found is None and etag is not None and state is None:
                return  # damaged, and there is nothing to put in its place yet
            # What is listed here belongs to writers that have lost, once the write below succeeded.
            sizes, uploads = self._listed()
            former = found or Latest(writer=self._id, sequence=0, run=state.run if state else "")
            latest = former.model_copy(update={"writer": self._id, "sequence": former.sequence + 1})
            self._etag = self._folder.write_if(LATEST_NAME, latest.encoded(), etag)
            if self._etag is not None:
                break
        else:
            raise RuntimeError("other processes take it over at this very moment")
        self._latest = latest
        self._stored = {
            (item.name, item.sha256): item
            for item in latest.objects
            if item.key not in self.damaged and (sizes is None or sizes.get(item.key) == item.bytes)
        }
        if found is not None or etag is None:  # else what it named is not known, and may be all there is
            self._unnamed = {key for key in sizes or () if KEY.fullmatch(key)} - latest.keys
        for key, token in uploads:
            with contextlib.suppress(Exception):
                self._folder.create(key, 0, token).abort()

    def _check_still_ours(self) -> None:
        """Before much is uploaded for nothing."""
        found, _ = self._read_latest()
        if found is not None and found.writer != self._id:
            raise TakenOver

    def _read_latest(self) -> tuple[Latest | None, str | None]:
        """What is there, and its ETag; None for what cannot be used, and None for both where nothing is."""
        try:
            content, etag = self._folder.read_with_etag(LATEST_NAME, MOST_LISTING_BYTES)
        except FileNotFoundError:
            return None, None
        with contextlib.suppress(ValueError):
            return parse_latest(content, LATEST_NAME), etag
        return None, etag

    def _listed(self) -> tuple[dict[str, int] | None, list[tuple[str, str]]]:
        """Sizes of the objects by key, and unfinished uploads; None and [] where listing is not permitted."""
        try:
            files = [file for folder in FOLDERS for file in self._folder.files(folder)]
            uploads = self._folder.unfinished()
        except Exception:
            return None, []
        ours = [(key, token) for key, token in uploads if KEY.fullmatch(key)]
        return {file.name: file.num_bytes for file in files}, ours

    def publish(self, state: State, go_on: Callable[[HeldFile | None], None]) -> None:
        """Upload what is not there yet, the newest first; then name it.

        Args:
            go_on: called between files and, with the file, between its pieces; raises where the rest is not
                wanted.

        Raises:
            TakenOver, RuntimeError: as `take_over`.
        """
        checkpoints: list[MirroredCheckpoint] = []
        files: list[MirroredFile] = []
        for position, file in enumerate(reversed(state.checkpoints)):
            try:
                stored = self._store("checkpoints", file, file.sha256 or "", go_on)
            except NotWhole as error:
                self._say(f"warning: {error}; it is not mirrored")
                continue
            checkpoints.insert(0, MirroredCheckpoint(**dict(stored)))
            if position == 0:
                files = self._store_files(state, go_on)
                if self._lacks_any(state):  # older ones take time that there may not be
                    self._announce_state(state, [*self._stored_older(state), checkpoints[0]], files)
        if checkpoints:
            self._announce_state(state, checkpoints, files or self._store_files(state, go_on))

    def _lacks_any(self, state: State) -> bool:
        return any((file.name, file.sha256 or "") not in self._stored for file in state.checkpoints)

    def _stored_older(self, state: State) -> list[MirroredCheckpoint]:
        """Those of its checkpoints but the newest that are in the mirror already."""
        known = [self._stored.get((file.name, file.sha256 or "")) for file in state.checkpoints[:-1]]
        return [MirroredCheckpoint(**dict(stored)) for stored in known if stored is not None]

    def _store_files(self, state: State, go_on: Callable[[HeldFile | None], None]) -> list[MirroredFile]:
        files: list[MirroredFile] = []
        for file in state.files:
            with contextlib.suppress(NotWhole):  # written to at this moment: the next state has it
                files.append(MirroredFile(**dict(self._store("files", file, file.digest(), go_on))))
        return files

    def _announce_state(
        self, state: State, checkpoints: list[MirroredCheckpoint], files: list[MirroredFile]
    ) -> None:
        assert self._latest is not None
        self._announce(
            Latest(
                writer=self._id,
                sequence=self._latest.sequence + 1,
                run=state.run,
                step=checkpoints[-1].step,
                checkpoints=tuple(checkpoints),
                best=state.best if state.best in {item.name for item in checkpoints} else None,
                files=tuple(files),
            )
        )

    def _store(
        self,
        folder: Literal["checkpoints", "files"],
        file: HeldFile,
        sha256: str,
        go_on: Callable[[HeldFile | None], None],
    ) -> MirroredCheckpoint | MirroredFile:
        go_on(None)
        identity = (file.name, sha256)
        if identity not in self._stored:
            if identity not in self._keys:
                self._num_keys += 1
                self._keys[identity] = new_key(folder, file.name, sha256, self._id, self._num_keys)
            key = self._keys[identity]
            upload(self._folder, key, file, sha256, lambda: go_on(file))
            fields: dict[str, Any] = {"name": file.name, "key": key, "sha256": sha256}
            fields["bytes"] = file.num_bytes
            if folder == "checkpoints":
                self._stored[identity] = MirroredCheckpoint(step=file.step or 0, **fields)
            else:
                self._stored[identity] = MirroredFile(**fields)
        return self._stored[identity]

    def _announce(self, latest: Latest) -> None:
        for _ in range(ROUNDS):
            etag = self._folder.write_if(LATEST_NAME, latest.encoded(), self._etag)
            if etag is not None:
                break
            found, self._etag = self._read_latest()
            if found is not None and found.writer != self._id:
                raise TakenOver
            if self._etag is None:
                self._latest, self._stored, self._keys = None, {}, {}  # somebody emptied it: begin anew
                raise RuntimeError(f"its {LATEST_NAME} was deleted")
        else:
            raise RuntimeError(f"its {LATEST_NAME} arrives damaged")
        self._etag = etag
        before = {*(self._latest.keys if self._latest else ()), *self._keys.values()}
        self._latest = latest
        self._unnamed |= before - latest.keys
        self._stored = {identity: item for identity, item in self._stored.items() if item.key in latest.keys}
        self._keys = {identity: key for identity, key in self._keys.items() if key in latest.keys}

    def delete_unnamed(self, is_urgent: Callable[[], bool]) -> None:
        """Remove objects that no `latest.json` names, nor ever will.

        What cannot be removed now is after the next state, or by the next writer. `is_urgent`: whether there
        is something more important to do.
        """
        for key in sorted(self._unnamed):
            if is_urgent():
                return
            try:
                self._folder.delete(key)
            except Exception:
                return
            self._unnamed.discard(key)
