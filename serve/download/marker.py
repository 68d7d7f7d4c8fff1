"""`fetched.json`: of which run a folder is a copy, so that a later call may bring what the run has become."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.plain_json import read_json
from data_prep.storage import write_atomically
from train.checkpoint.fetch import MARKER_NAME


def is_of(folder: Path, kind: str, origin: str) -> bool:
    """Whether `folder` was made from this very run; `kind`: `folder`, `mirror`, `mlflow`."""
    try:
        return read_json(folder / MARKER_NAME).get(kind) == origin
    except (OSError, ValueError, AttributeError):
        return False


def mark(folder: Path, kind: str, origin: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARKER_NAME, (json.dumps({kind: origin}) + "\n").encode())
