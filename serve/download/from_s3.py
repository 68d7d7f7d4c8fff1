"""A run from its mirror in S3, or a single checkpoint from anywhere in S3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.progress import progress_bar
from data_prep.storage import open_folder
from serve.download.marker import is_of
from serve.download.resumable import bring_file
from train.checkpoint import MANIFEST_NAME
from train.checkpoint.fetch import fetch, read_latest

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder


def bring(location: str, folder: Path) -> Path:
    """Bring a run (`s3://bucket/runs/mine`, as a training mirrors it) or a checkpoint (`….pt`) to `folder`.

    Returns:
        The run folder, or the checkpoint file in it.

    Raises:
        ValueError: there is none, it is damaged, or the folder holds another run.
        RuntimeError: S3 cannot be read.
    """
    if location.endswith(".pt"):
        return _bring_checkpoint(location, folder)
    s3: S3Folder = open_folder(location)  # type: ignore[assignment]
    latest = read_latest(s3)
    if latest is None or not latest.checkpoints:
        raise ValueError(
            f"{location} holds no run: name the prefix that has latest.json, s3://bucket/runs/NAME"
        )
    if _is_ours(folder, s3.location):
        # The large files first, piece by piece; what follows finds them whole.
        wanted = {item.name: item for item in latest.checkpoints if item.name == latest.best}
        wanted[latest.checkpoints[-1].name] = latest.checkpoints[-1]
        with progress_bar(sum(item.bytes for item in wanted.values()), "download", unit="B") as bar:
            for item in wanted.values():
                key = item.key
                try:
                    bring_file(
                        lambda offset, length, key=key: s3.read(key, offset, length),  # type: ignore[misc]
                        folder / "checkpoints" / item.name,
                        item.bytes,
                        item.sha256,
                        bar,
                    )
                except (FileNotFoundError, ValueError):
                    continue  # a run at work has moved on, or it is damaged: `fetch` looks, and says it
    fetch(location, folder, say=lambda line: print(line, file=sys.stderr))
    return folder


def _is_ours(folder: Path, location: str) -> bool:
    """Whether nothing of another run can be overwritten there."""
    if not (folder / "checkpoints" / MANIFEST_NAME).exists():
        return True
    return is_of(folder, "mirror", location)


def _bring_checkpoint(location: str, folder: Path) -> Path:
    parent, _, name = location.rpartition("/")
    s3 = open_folder(parent)
    info = s3.info(name)
    if info is None:
        raise ValueError(f"{location} does not exist")
    path = folder / name
    with progress_bar(info.num_bytes, "download", unit="B") as bar:
        bring_file(lambda offset, length: s3.read(name, offset, length), path, info.num_bytes, None, bar)
    return path
