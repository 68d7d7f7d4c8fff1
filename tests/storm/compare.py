"""The calm training against the stormy one: everything that decides a result must be equal, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.storm.records import Records
from tests.storm.runner import NUM_RANKS, Training
from train.checkpoint import CheckpointStore, load_checkpoint
from train.config import flatten
from train.run_folder import FREE_KEYS, is_finished
from train.tracking.metrics_file import read_metrics

# What tells of time, speed, cost or memory, and differs between two calm runs, too.
TIMED_PROGRESS = (
    *("elapsed_seconds", "train_seconds", "validation_seconds", "wait_seconds", "train_images"),
    "mlflow_run_id",
)
TIMED_FIELDS = (
    *("time", "images_per_second", "data_wait_fraction", "mfu", "memory_bytes"),
    *("cost_usd", "epoch_cost_usd", "estimated_cost_usd"),
)


def differences(calm: Training, stormy: Training) -> list[str]:
    """What differs, in sentences; empty where nothing was lost."""
    found: list[str] = []
    for training in (calm, stormy):
        if not is_finished(training.folder):
            found.append(f"{training.plan.name} is not finished: status.json says {training.status!r}")
    if found:
        return found
    found += _checkpoint_differences(calm.folder, stormy.folder)
    found += _metrics_differences(calm.folder, stormy.folder)
    found += _sample_differences(calm.records, stormy.records)
    return found


def _checkpoint_differences(calm: Path, stormy: Path) -> list[str]:
    folders = [folder / "checkpoints" for folder in (calm, stormy)]
    manifests = [CheckpointStore(folder).manifest() for folder in folders]
    last = [load_checkpoint(f / m.checkpoints[-1].name) for f, m in zip(folders, manifests, strict=True)]
    best = [load_checkpoint(folder / "best.pt") for folder in folders]
    found = []
    for name, (one, other) in (("last", last), ("best", best)):
        found += [
            f"{name} checkpoint: {words}" for words in _unequal(_comparable(one), _comparable(other), "")
        ]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (entry := manifest.entry(manifest.best)) is None:
            found.append(f"{folder}: no checkpoint is named best")
        elif (folder / entry.name).read_bytes() != (folder / "best.pt").read_bytes():
            found.append(f"{folder}: best.pt is not {entry.name}, which is named best")
    weights = [load_file(folder / "best.safetensors") for folder in folders]
    found += [f"best.safetensors: {sentence}" for sentence in _unequal(weights[0], weights[1], "")]
    return found


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    progress = {name: value for name, value in state["progress"].items() if name not in TIMED_PROGRESS}
    recipe = flatten(yaml.safe_load(state["recipe"]) if isinstance(state["recipe"], str) else state["recipe"])
    bound = {key: value for key, value in recipe.items() if not key.startswith(FREE_KEYS)}
    return state | {"progress": progress, "recipe": bound}


def _unequal(one: Any, other: Any, place: str) -> Iterator[str]:
    """Where two trees differ, at most one sentence a leaf."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not _same_bits(one, other):
            yield f"{place} differs"
    elif isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            yield f"{place}: keys differ: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one.keys() & other.keys():
            yield from _unequal(one[key], other[key], f"{place}.{key}" if place else str(key))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{place}: {len(one)} members and {len(other)}"
        for position, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _unequal(a, b, f"{place}[{position}]")
    elif type(one) is not type(other) or one != other:
        yield f"{place}: {one!r} in the calm run, {other!r} in the stormy one"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def _metrics_differences(calm: Path, stormy: Path) -> list[str]:
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (calm, stormy)]
    names = [[(row["step"], row["split"]) for row in some] for some in rows]
    found = []
    if len(set(names[1])) < len(names[1]):
        twice = sorted({name for name in names[1] if names[1].count(name) > 1})
        found.append(f"metrics.jsonl: rows written twice: {twice[:5]}")
    if missing := [name for name in names[0] if name not in names[1]]:
        found.append(f"metrics.jsonl: rows missing: {missing[:5]}")
    if names[0] != names[1] and not found:
        found.append("metrics.jsonl: the rows have another order, or there are more of them")
    if not found:
        for one, other in zip(*rows, strict=True):
            kept = [{k: v for k, v in row.items() if k not in TIMED_FIELDS} for row in (one, other)]
            place = f"metrics.jsonl, {one['split']} row of step {one['step']}"
            found += list(_unequal(kept[0], kept[1], place))
    return found


def _sample_differences(calm: Records, stormy: Records) -> list[str]:
    found = []
    for rank in range(NUM_RANKS):
        one, other = calm.samples(rank), stormy.samples(rank)
        if one == other:
            continue
        pairs = zip(one, other, strict=False)
        first = next((a[0] for a, b in pairs if a != b), min(len(one), len(other)))
        found.append(f"rank {rank} was given other samples from step {first} on")
    return found
