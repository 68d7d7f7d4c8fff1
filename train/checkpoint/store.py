"""Checkpoints: one file each, atomic, with a checksum; and the list of those that count.

    checkpoints/
      manifest.json         [{name, step, sha256, bytes}, …] and which one is best; written after the files
      step-00000560.pt      everything a run needs to go on
      best.pt               the best one under a stable name (a hard link)
      best.safetensors      its weights alone

A file is written under a temporary name, flushed, renamed, and only then named in the manifest; old ones are
deleted after that. Loaded with `weights_only=True`, after its checksum.

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
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.manifest import FileName
from data_prep.storage import sha256_file, sync_folder, write_atomically
from train.checkpoint.untrusted import read_checkpoint_file

CHECKPOINT_VERSION = 1
CHECKPOINT_KEYS = ("model", "optimizer", "schedule", "progress", "recipe", "class_names", "mean", "std")
MANIFEST_NAME = "manifest.json"
BEST_NAME = "best.pt"
BEST_WEIGHTS_NAME = "best.safetensors"


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


class CheckpointStore:
    """The checkpoint folder of a run; only the primary rank writes to it."""

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

    def save(self, state: dict[str, Any], step: int, is_best: bool, keep_last: int) -> CheckpointEntry:
        """Write `state`, announce it, then delete what is neither best nor among the last `keep_last`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.manifest()
        name = f"step-{step:08d}.pt"
        entry = self._write(state, name, step)
        others = [old for old in manifest.checkpoints if old.name != name]
        best = name if is_best or (manifest.best is None) else manifest.best
        kept = [old for old in others if old.name == best]
        recent = [old for old in others if old.name != best][-(keep_last - 1) :] if keep_last > 1 else []
        entries = sorted({*kept, *recent, entry}, key=lambda kept_entry: kept_entry.step)
        announced = CheckpointManifest(checkpoints=tuple(entries), best=best)
        write_atomically(self.folder / MANIFEST_NAME, (announced.model_dump_json(indent=2) + "\n").encode())
        if best == name:
            # The weights of which the headline speaks.
            self._publish_best(name, state["ema" if state.get("headline_weights") == "ema" else "model"])
        for orphan in self.folder.glob(".step-*.partial"):
            orphan.unlink()  # of a crash in the middle of a save
        for old in self.folder.glob("step-*.pt"):
            if announced.entry(old.name) is None:
                old.unlink()
        return entry

    def _write(self, state: dict[str, Any], name: str, step: int) -> CheckpointEntry:
        partial = self.folder / f".{name}.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        entry = CheckpointEntry(
            name=name, step=step, sha256=sha256_file(partial), bytes=partial.stat().st_size
        )
        partial.replace(self.folder / name)
        sync_folder(self.folder)
        return entry

    def _publish_best(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        link = self.folder / f".{BEST_NAME}.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(self.folder / name, link)
        except OSError:
            shutil.copyfile(self.folder / name, link)  # a file system without hard links
        link.replace(self.folder / BEST_NAME)
        partial = self.folder / f".{BEST_WEIGHTS_NAME}.partial"
        save_file({key: value.contiguous().clone() for key, value in weights.items()}, partial)
        partial.replace(self.folder / BEST_WEIGHTS_NAME)

    def load_latest(self, say: Any = print) -> tuple[CheckpointEntry, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None for a new run; names each one passed over."""
        entries = sorted(self.manifest().checkpoints, key=lambda entry: entry.step, reverse=True)
        for entry in entries:
            try:
                return entry, load_checkpoint(self.folder / entry.name)
            except ValueError as error:
                say(f"warning: {error}; trying the one before it")
        if entries:
            raise ValueError(f"none of the {len(entries)} checkpoints in {self.folder} is whole")
        return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, checked against the manifest beside it where there is one.

    Args:
        path: a checkpoint file, or a run folder (its best checkpoint).

    Raises:
        ValueError: missing, truncated, damaged, hostile, or no checkpoint of this project.
    """
    if path.is_dir():
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        path = inside / BEST_NAME
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
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
    if entry is None:
        return
    size = path.stat().st_size
    digest = sha256_file(path) if size == entry.bytes or is_best else ""
    if digest == entry.sha256:
        return
    if is_best and digest in {old.sha256 for old in manifest.checkpoints}:
        return  # a crash between manifest and link left the former best one here, which is whole
    if size != entry.bytes:
        raise ValueError(f"checkpoint {path} is truncated: {size:,} bytes instead of {entry.bytes:,}")
    raise ValueError(f"checkpoint {path} is damaged: its SHA-256 is not the one it was saved with")


def state_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and values of `weights`: equal exactly where two models are."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
