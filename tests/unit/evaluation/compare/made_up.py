"""Runs and predictions of the tests, made up: no training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from evaluation.metrics import Predictions

RECIPE = """
data: {path: DATA, global_batch_size: 24, resolution: 32}
model: {library: own, name: residual_cnn, options: {widths: [4, 4, 8, 8]}}
schedule: {phases: [{kind: one_cycle, epochs: 8}]}
validation: {resolution: 40, crop_ratio: 1.0}
"""


def write_run(folder: Path, top1=(0.3, 0.5, 0.6, 0.7), num_rows: int = 40, **summary) -> Path:
    """A run folder without a checkpoint, as a training that ended leaves it."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder.parent / "no-such-data")))
    num_epochs, best = len(top1), int(np.argmax(top1))
    rows = [
        {
            "step": row + 1,
            "epoch": num_epochs * (row + 1) / num_rows,
            "split": "train",
            "loss": 2.0 * 0.97**row,
        }
        | {"learning_rate": 0.1, "images_per_second": 100.0, "memory_bytes": 5e8, "time": 1e9 + row}
        for row in range(num_rows)
    ]
    rows += [
        {"step": num_rows * epoch // num_epochs, "epoch": epoch, "split": "val", "loss": 2 - value}
        | {"top1": value, "top5": min(1.0, value + 0.2), "time": 1e9 + epoch}
        for epoch, value in enumerate(top1, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "final_top1": top1[-1],
        "final_top5": min(1.0, top1[-1] + 0.2),
        "best_top1": top1[best],
        "best_top5": min(1.0, top1[best] + 0.2),
        "best_epoch": best + 1,
        "epochs": num_epochs,
        "world_size": 1,
        "validation_resolution": 40,
        "num_parameters": 12_345,
        "images_per_second": 100.0,
        "memory_bytes": 500_000_000,
        "wall_seconds": 75.0,
        "cost_usd": 0.02,
        "skipped_steps": 0,
        "stopped_because": "finished",
    }
    (folder / "summary.json").write_text(json.dumps(fields | summary))
    return folder


def make_predictions(
    right, num_classes: int = 4, names=None, first_id: int = 0, shuffle: bool = False
) -> Predictions:
    """One sample an entry of `right`: its label is the position modulo num_classes; wrong ones take the "
    "next."""
    right = np.asarray(right, dtype=bool)
    labels = np.arange(len(right)) % num_classes
    answers = np.where(right, labels, (labels + 1) % num_classes)
    order = np.random.default_rng(0).permutation(len(right)) if shuffle else np.arange(len(right))
    names = names or tuple(f"class {label}" for label in range(num_classes))
    return Predictions(np.eye(num_classes)[answers][order], labels[order], first_id + order, tuple(names))
