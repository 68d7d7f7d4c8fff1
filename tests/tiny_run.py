"""A run folder in an instant: a small network with random weights in a checkpoint of the project's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from train.checkpoint.store import CHECKPOINT_KEYS, CHECKPOINT_VERSION
from train.config import dump_recipe, parse_recipe
from train.models.build import build_model

RECIPE = """
data: {path: DATA, loader: reference, num_workers: 0, global_batch_size: 24, resolution: 32}
model: {library: timm, name: NAME}
optimizer: {name: sgd, peak_lr: 0.05}
schedule: {phases: [{kind: cosine, epochs: 1}]}
validation: {crop_ratio: 0.875}
precision: {mode: fp32}
tracking: {mlflow: false}
"""
CLASS_NAMES = ("boat", "church", "dune", "harbour", "meadow", "summit")


def write_tiny_run(
    folder: Path,
    model: str = "test_resnet",
    seed: int = 0,
    class_names: tuple[str, ...] = CLASS_NAMES,
    best_top1: float | None = 0.8125,
    data: str = "data/nowhere",
) -> Path:
    """`folder` as a run that has ended: recipe.yaml, summary.json, checkpoints/best.pt."""
    recipe = parse_recipe(RECIPE.replace("DATA", data).replace("NAME", model))
    torch.manual_seed(seed)
    network = build_model(recipe.model, len(class_names)).eval()
    with torch.no_grad():  # random heads say the same of all images: make their answers differ
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
    state = dict.fromkeys(CHECKPOINT_KEYS) | {
        "version": CHECKPOINT_VERSION,
        "model": network.state_dict(),
        "recipe": dump_recipe(recipe),
        "class_names": list(class_names),
        "mean": [0.45, 0.45, 0.45],
        "std": [0.25, 0.25, 0.25],
        "progress": {"epoch": 1},
        "data_identity": "",
    }
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(state, folder / "checkpoints" / "best.pt")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    if best_top1 is not None:
        (folder / "summary.json").write_text(json.dumps({"best_top1": best_top1}))
    return folder
