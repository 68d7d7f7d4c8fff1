"""`python -m train fetch s3://bucket/runs/mine runs/mine`: bring a run from its mirror to this machine.

The newest checkpoint, the best one and the files of the run, each believed only when its SHA-256 is right
here; `best.pt` and `best.safetensors` are made from them. Called again, whole files stay, and what is missing
or newer in the mirror is brought.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.plain_json import read_json
from data_prep.storage import exclusive_lock, open_folder, write_atomically
from train.checkpoint.mirror import CheckpointMirror
from train.checkpoint.mirror_listing import (
    LATEST_NAME,
    MOST_LISTING_BYTES,
    Latest,
    MirroredCheckpoint,
    parse_latest,
)
from train.checkpoint.store import MANIFEST_NAME, CheckpointStore, is_whole
from train.checkpoint.transfer import download

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

MARKER_NAME = "fetched.json"  # says that the folder is a copy, and of what
ROUNDS = 5  # a run at work deletes what it has replaced


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train fetch", description="bring a run's newest and best checkpoint from its mirror"
    )
    parser.add_argument("mirror", help="s3://bucket/prefix/run-name, as in checkpoint.mirror")
    parser.add_argument("folder", type=Path, help="where to, runs/NAME")
    parser.add_argument("--json", action="store_true", help="what is there, as one JSON object")
    options = parser.parse_args(arguments)
    try:
        facts = fetch(options.mirror, options.folder, say=_say)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts))
    else:
        best = facts["best"]
        print(
            f"{options.folder} has step {facts['step']}; best: {best['name']}, {best['bytes']:,} bytes, "
            f"SHA-256 {best['sha256']} as in the mirror"
        )
    return 0


def fetch(mirror: str, folder: Path, say: Any = print) -> dict[str, Any]:
    """Bring what the mirror has newer, and check all that it names as newest and best.

    Returns: `{"step", "best": {"name", "step", "bytes", "sha256"}, "path"}` of what is in `folder` now.

    Raises:
        ValueError: there is no run; the folder holds another run; what is there is damaged.
        RuntimeError: S3 cannot be read, or a training is at work in the folder.
        OSError: the disk cannot be written.
    """
    s3: S3Folder = open_folder(mirror)  # type: ignore[assignment]
    latest = read_latest(s3)
    if latest is None or not latest.checkpoints:
        raise ValueError(f"{s3.location} holds no checkpoint yet: wait for the run's first one")
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        _refuse_another(folder, s3.location, latest)
        store = CheckpointStore(folder / "checkpoints")
        for attempt in range(ROUNDS):
            CheckpointMirror(mirror, say).restore(folder)
            latest = read_latest(s3) or latest
            newest = latest.checkpoints[-1]
            best = next((item for item in latest.checkpoints if item.name == latest.best), newest)
            try:
                _complete(s3, store, newest, best)
                break
            except FileNotFoundError:  # a run at work has moved on, and deleted what it named
                if attempt + 1 == ROUNDS:
                    raise
        store.publish_best()
        store.remove_unnamed()
    return {
        "step": newest.step,
        "best": best.entry.model_dump(mode="json"),
        "path": str(store.folder / "best.pt"),
    }


def read_latest(s3: S3Folder) -> Latest | None:
    """What the mirror says is newest; None where there is none.

    Raises:
        ValueError: it cannot be used. RuntimeError: S3 cannot be read.
    """
    try:
        content, _ = s3.read_with_etag(LATEST_NAME, MOST_LISTING_BYTES)
    except FileNotFoundError:
        return None
    return parse_latest(content, s3.path_of(LATEST_NAME))


def _refuse_another(folder: Path, mirror: str, latest: Latest) -> None:
    """A folder of the same name with checkpoints that are not of this run must not be mixed with it."""
    there = CheckpointStore(folder / "checkpoints").manifest().checkpoints
    theirs = {item.name: item.sha256 for item in latest.checkpoints}
    is_known = any(theirs.get(entry.name) == entry.sha256 for entry in there)
    with contextlib.suppress(OSError, ValueError):
        is_known = is_known or read_json(folder / MARKER_NAME).get("mirror") == mirror
    if there and not is_known:
        raise ValueError(
            f"{folder} holds checkpoints of another run: choose another folder, or move that one away"
        )
    newest = max((entry.step for entry in there), default=-1)
    if newest > (latest.step or 0):
        raise ValueError(
            f"{folder} is at step {newest}, beyond the mirror's {latest.step}: it is newer than its mirror; "
            "choose another folder"
        )
    write_atomically(folder / MARKER_NAME, (json.dumps({"mirror": mirror}) + "\n").encode())


def _complete(
    s3: S3Folder, store: CheckpointStore, newest: MirroredCheckpoint, best: MirroredCheckpoint
) -> None:
    """Both of them, whole, and a manifest that says so: `restore` brings neither where the step is ours."""
    for item in (best, newest):
        path = store.folder / item.name
        if not is_whole(path, item.entry):
            download(s3, item.key, path, item.bytes, item.sha256)
    manifest = store.manifest()
    entries = {entry.name: entry for entry in (*manifest.checkpoints, best.entry, newest.entry)}
    listed = tuple(sorted(entries.values(), key=lambda entry: entry.step))
    wanted = manifest.model_copy(update={"checkpoints": listed, "best": best.name})
    if wanted != manifest:
        write_atomically(store.folder / MANIFEST_NAME, (wanted.model_dump_json(indent=2) + "\n").encode())


def _say(line: str) -> None:
    print(line, file=sys.stderr)
