"""Which models a demo offers: what the command line names, and the runs of an MLflow experiment.

Nothing is opened or fetched here but names and figures; a model is when somebody chooses it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from evaluation.predict import checkpoint_file
from serve.demo.torch_model import open_shown, top1_of
from serve.model_folder import is_exported
from serve.page.models import Entry
from serve.portable.limits import Limits


def entries_of_paths(paths: Sequence[Path], limits: Limits) -> list[Entry]:
    """An entry a run, checkpoint or exported folder, by its shortest name that no other one has.

    Raises:
        ValueError: there is none of these at one of the paths.
    """
    for path in paths:
        if not is_exported(path) and not checkpoint_file(path).is_file():
            raise ValueError(
                f"{path} is no run with a checkpoint, no checkpoint and no exported folder: name one of these"
            )
    resolved = list(dict.fromkeys(path.resolve() for path in paths))
    names = _shortest_names(resolved)
    return [
        Entry(name, functools.partial(open_shown, path, limits), _note(path))
        for name, path in zip(names, resolved, strict=True)
    ]


def _note(path: Path) -> str:
    top1 = top1_of(path)
    return f"top-1 {top1}" if top1 else ""


def _shortest_names(paths: Sequence[Path]) -> list[str]:
    """`mine` of runs/mine/checkpoints/best.pt; with more of the path where that is not enough."""
    parts = [path.with_suffix("").parts if path.is_file() else path.parts for path in paths]
    parts = [(*words[:-2], words[-2]) if words[-2:] == ("checkpoints", "best") else words for words in parts]
    parts = [tuple(word for word in words if word != "checkpoints") for words in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(words[-length:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
