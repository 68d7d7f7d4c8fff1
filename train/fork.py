"""A run that goes on from another one's newest checkpoint under a recipe of its own: `train … --fork`.

The other run stays as it is. The new one has its name with `-fork`, its metrics up to that step, and where it
comes from in `fork.json`; what is best begins anew, since another recipe may measure otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.plain_json import read_json
from data_prep.storage import sync_folder, write_atomically
from train.checkpoint import MANIFEST_NAME, CheckpointManifest, CheckpointStore

FORK_NAME = "fork.json"


def fork_run(source: Path, folder: Path, metrics_name: str) -> None:
    """Make `folder` a run that stands where the newest whole checkpoint of `source` does.

    Raises:
        ValueError: there is no checkpoint to go on from.
    """
    store = CheckpointStore(source / "checkpoints")
    entry = store.newest_whole()  # its own training may be at work there
    if entry is None:
        raise ValueError(f"{source} has no checkpoint to fork from: run the command without --fork")
    # Under another name until all of it is there.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a start that ended before it had a checkpoint
    inside = partial / "checkpoints"
    inside.mkdir(parents=True)
    try:
        shutil.copyfile(store.folder / entry.name, inside / entry.name)
    except FileNotFoundError:
        raise ValueError(
            f"{source} is being trained, and deleted {entry.name}: run the command again"
        ) from None
    if (source / metrics_name).is_file():
        shutil.copyfile(source / metrics_name, partial / metrics_name)
    origin = {"from": source.name, "step": entry.step, "checkpoint": entry.name, "sha256": entry.sha256}
    write_atomically(partial / FORK_NAME, (json.dumps(origin, indent=1) + "\n").encode())
    manifest = CheckpointManifest(checkpoints=(entry,))
    write_atomically(inside / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode())
    with (inside / entry.name).open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(folder)
    sync_folder(folder.parent)


def origin_of(folder: Path) -> dict[str, Any]:
    """What `fork.json` says; empty for a run that is no fork."""
    try:
        origin = read_json(folder / FORK_NAME)
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}
