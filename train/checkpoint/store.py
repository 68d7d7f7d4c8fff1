"""Checkpoints: one file each, atomic, with a checksum; and the list of those that count.

    checkpoints/
      manifest.json         [{name, step, sha256, bytes}, …] and which one is best; written after the files
      step-00000560.pt      everything a run needs to go on
      best.pt               the best one under a stable name (a copy)
      best.safetensors      its weights alone

A file is written under a temporary name, flushed, renamed, and only then named in the manifest; old ones are
deleted after that. No name is used twice as long as the manifest has it. Loaded with `weights_only=True`,
after its checksum.

Example:
    >>> store = CheckpointStore(Path("runs/demo/checkpoints"))
    >>> store.save(state, step=560, is_best=True, keep_last=2)
    >>> state = load_checkpoint(Path("runs/demo/checkpoints/best.pt"))
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from pydantic import ValidationError

from data_prep.storage import sha256_file, sync_folder, write_atomically
from train.checkpoint.files import HashedFile, fault_of, is_whole, replace_durably, umask, zip_fault
from train.checkpoint.manifest import CheckpointEntry, CheckpointManifest, free_name, order_of, pruned
from train.checkpoint.untrusted import read_checkpoint_file

CHECKPOINT_VERSION = 1
CHECKPOINT_KEYS = ("model", "optimizer", "schedule", "progress", "recipe", "class_names", "mean", "std")
MANIFEST_NAME = "manifest.json"
BEST_NAME = "best.pt"
BEST_WEIGHTS_NAME = "best.safetensors"


class CheckpointStore:
    """The checkpoint folder of a run; only the primary rank writes to it, one thread at a time.

    A process may die at any point of any method: what the manifest names is on the disk, whole, and nothing
    that it names is ever overwritten or removed before a newer manifest is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> CheckpointManifest:
        """What is there; empty for a new run.

        Raises:
            ValueError: the manifest is damaged.
        """
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return CheckpointManifest()
        try:
            return CheckpointManifest.model_validate_json(path.read_bytes())
        except ValidationError:
            raise ValueError(f"{path} is damaged: restore it, or name a checkpoint file directly") from None

    def save(
        self,
        state: dict[str, Any],
        step: int,
        is_best: bool,
        keep_last: int,
        before_announcing: Callable[[], None] = lambda: None,
    ) -> CheckpointEntry:
        """Write `state`, announce it, then delete what is neither best nor among the last `keep_last`.

        Args:
            before_announcing: called when the file is durable and the manifest does not name it yet.

        Raises:
            OSError: it cannot be written (a full disk …); what was announced before still stands.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_partials()
        try:
            manifest = self.manifest()
        except ValueError:
            manifest = self._rebuilt(lambda line: None)
        entry = self._write(state, free_name(manifest, step), step)
        before_announcing()
        entries = (*manifest.checkpoints, entry)
        best = entry.name if is_best or manifest.best is None else manifest.best
        self._announce(pruned(CheckpointManifest(checkpoints=entries, best=best), keep_last))
        if best == entry.name:
            self.publish_best()
        self.remove_unnamed()
        return entry

    def _announce(self, manifest: CheckpointManifest) -> None:
        content = manifest.model_dump_json(indent=2) + "\n"
        write_atomically(self.folder / MANIFEST_NAME, content.encode())

    def prune(self, keep_last: int) -> None:
        """Keep the best and the last few: what a full disk leaves room for."""
        self._announce(pruned(self.manifest(), keep_last))
        self.remove_unnamed()

    def remove_unnamed(self) -> None:
        """Delete checkpoint files that the manifest does not name: pruned ones, and those of a crash."""
        self._remove_partials()
        manifest = self.manifest()
        for path in self.folder.glob("step-*.pt"):
            if manifest.entry(path.name) is None:
                path.unlink(missing_ok=True)

    def _remove_partials(self) -> None:
        for path in self.folder.glob(".*.partial"):
            path.unlink(missing_ok=True)  # of a crash in the middle of a save

    def _write(self, state: dict[str, Any], name: str, step: int) -> CheckpointEntry:
        partial = self.folder / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                hashed = HashedFile(file)
                try:
                    torch.save(state, cast(IO[bytes], hashed))
                except Exception:
                    if hashed.error is not None:
                        raise hashed.error from None  # torch raises another one in its place
                    raise
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk needs the room
            raise
        size = partial.stat().st_size
        entry = CheckpointEntry(name=name, step=step, sha256=hashed.digest.hexdigest(), bytes=size)
        partial.replace(self.folder / name)
        sync_folder(self.folder)
        return entry

    def publish_best(self) -> None:
        """Make `best.pt` and `best.safetensors` what the manifest says; nothing where they are already.

        They are copies, not links: so the best weights survive a damaged disk block, and each of the two
        files can be mended from the other.
        """
        manifest = self.manifest()
        entry = manifest.entry(manifest.best)
        if entry is None:
            return
        source, copy = self.folder / entry.name, self.folder / BEST_NAME
        if is_whole(copy, entry):
            if not is_whole(source, entry):
                self._copy(copy, source)
        elif is_whole(source, entry):
            self._copy(source, copy)
        else:
            raise ValueError(
                f"the best checkpoint, {source}, is damaged, and so is its copy {BEST_NAME}: "
                f"{BEST_WEIGHTS_NAME} may still hold its weights"
            )
        self._publish_weights(entry)

    def _publish_weights(self, entry: CheckpointEntry) -> None:
        from safetensors.torch import save_file

        path = self.folder / BEST_WEIGHTS_NAME
        if self._digest_of_weights() == entry.sha256:
            return
        state = load_checkpoint(self.folder / entry.name)
        # The weights of which the headline speaks.
        weights = state["ema" if state.get("headline_weights") == "ema" else "model"]
        partial = self.folder / f".{BEST_WEIGHTS_NAME}.partial"
        save_file(
            {key: value.contiguous() for key, value in weights.items()},
            partial,
            {"format": "pt", "checkpoint_sha256": entry.sha256},
        )
        partial.chmod(0o666 & ~umask())  # safetensors makes it for the owner alone
        replace_durably(partial, path)

    def _copy(self, source: Path, target: Path) -> None:
        partial = self.folder / f".{target.name}.partial"
        shutil.copyfile(source, partial)
        replace_durably(partial, target)

    def newest_whole(self) -> CheckpointEntry | None:
        """The newest checkpoint that is whole, without changing anything: another process may write here."""
        try:
            entries = self.manifest().checkpoints
        except ValueError:
            return None
        return next((e for e in reversed(entries) if is_whole(self.folder / e.name, e)), None)

    def latest(self, say: Callable[[str], Any] = print) -> CheckpointEntry | None:
        """The newest checkpoint that is whole, or None for a new run.

        Each one passed over is named, and no longer listed: a run that goes on from an older one will come by
        the same steps again. A damaged best one is mended from its copy, a damaged manifest made anew.
        """
        try:
            manifest = self.manifest()
        except ValueError as error:
            say(f"warning: {error}")
            manifest = CheckpointManifest()
        if not manifest.checkpoints:
            manifest = self._rebuilt(say)
        for position in range(len(manifest.checkpoints) - 1, -1, -1):
            if self._is_usable(manifest.checkpoints[position], manifest, say):
                break
        else:
            if not manifest.checkpoints:
                return None
            raise ValueError(f"none of the {len(manifest.checkpoints)} checkpoints in {self.folder} is whole")
        used = manifest.checkpoints[: position + 1]
        if used != manifest.checkpoints:
            say(f"going on from {used[-1].name}, the newest that is whole")
            best = manifest.best if any(entry.name == manifest.best for entry in used) else None
            if best is None:
                self._keep_former_best()
            self._announce(CheckpointManifest(checkpoints=used, best=best))
        return used[-1]

    def _keep_former_best(self) -> None:
        """Another one will be the best, and these may be all that is left of the former."""
        for name in (BEST_NAME, BEST_WEIGHTS_NAME):
            if (path := self.folder / name).is_file():
                path.replace(self.folder / f"former-{name}")

    def _is_usable(
        self, entry: CheckpointEntry, manifest: CheckpointManifest, say: Callable[[str], Any]
    ) -> bool:
        fault = fault_of(self.folder / entry.name, entry)
        if fault is None:
            return True
        say(f"warning: {fault}")
        if entry.name != manifest.best or not is_whole(self.folder / BEST_NAME, entry):
            return False
        self._copy(self.folder / BEST_NAME, self.folder / entry.name)
        say(f"{entry.name} was mended from {BEST_NAME}, its copy")
        return True

    def _rebuilt(self, say: Callable[[str], Any]) -> CheckpointManifest:
        """A manifest of the files that are there, where there is none; their own checksums are compared."""
        entries = []
        for path in sorted(self.folder.glob("step-*.pt"), key=order_of):
            fault = "its name is not one of ours" if order_of(path)[0] < 0 else zip_fault(path)
            if fault is not None:
                say(f"warning: checkpoint {path} is damaged ({fault})")
                continue
            size = path.stat().st_size
            entries.append(
                CheckpointEntry(name=path.name, step=order_of(path)[0], sha256=sha256_file(path), bytes=size)
            )
        if not entries:
            return CheckpointManifest()
        known = {digest for digest in (self._digest_of_best(), self._digest_of_weights()) if digest}
        best = next((entry.name for entry in entries if entry.sha256 in known), None)
        if best is None:
            self._keep_former_best()
        manifest = CheckpointManifest(checkpoints=tuple(entries), best=best)
        say(f"{self.folder / MANIFEST_NAME} was made anew from {len(entries)} checkpoint(s) beside it")
        self._announce(manifest)
        return manifest

    def _digest_of_best(self) -> str | None:
        path = self.folder / BEST_NAME
        return sha256_file(path) if path.is_file() else None

    def _digest_of_weights(self) -> str | None:
        """SHA-256 of the checkpoint that `best.safetensors` was made from."""
        from safetensors import safe_open

        try:
            with safe_open(self.folder / BEST_WEIGHTS_NAME, "pt") as file:
                return (file.metadata() or {}).get("checkpoint_sha256")
        except Exception:  # missing or damaged, in whatever way: it tells nothing
            return None


def load_checkpoint(path: Path, check_sha256: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, checked against the manifest beside it where there is one.

    Args:
        path: a checkpoint file, or a run folder (its best checkpoint).
        check_sha256: not where it was just done; what is no checkpoint is refused all the same.

    Raises:
        ValueError: missing, truncated, damaged, hostile, or no checkpoint of this project.
    """
    if path.is_dir():
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        path = inside / BEST_NAME
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if check_sha256:
        _check_against_manifest(path)
    state = read_checkpoint_file(path)
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} is not a checkpoint of this project (version {CHECKPOINT_VERSION})")
    return state


def missing_keys(state: dict[str, Any]) -> list[str]:
    """Keys of a complete checkpoint that `state` lacks."""
    return [key for key in CHECKPOINT_KEYS if key not in state]


def _check_against_manifest(path: Path) -> None:
    listing = path.parent / MANIFEST_NAME
    if not listing.is_file():
        return  # downloaded on its own: torch.load finds truncation
    manifest = CheckpointStore(path.parent).manifest()
    is_best = path.name == BEST_NAME
    entry = manifest.entry(manifest.best if is_best else path.name)
    if entry is None or (fault := fault_of(path, entry)) is None:
        return
    if is_best and zip_fault(path) is None:
        return  # a crash between manifest and copy left the former best one here, which is whole
    raise ValueError(fault)


def state_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and values of `weights`: equal exactly where two models are."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
