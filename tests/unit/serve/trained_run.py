"""A run with a small network that was trained for a few seconds, in the form that training leaves it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_prep.manifest import load_manifest
from evaluation.stored_images import StoredImages
from serve.portable.limits import Limits
from serve.portable.preprocessing import Preprocessing
from train.checkpoint import CHECKPOINT_VERSION
from train.config import dump_recipe, parse_recipe
from train.data.batch import Normalize
from train.models.build import build_model, num_parameters

RESOLUTION = 48
TIMM = {"library": "timm", "name": "test_resnet"}
OWN = {"library": "own", "name": "residual_cnn", "options": {"widths": [8, 16, 24, 32]}, "dropout": 0.1}


def build_run(folder: Path, data: Path, model: dict[str, Any], *, steps: int = 30, **validation: Any) -> Path:
    """Train on the data set's train split and write `runs/NAME`; the same run for the same arguments.

    Args:
        validation: keys of the recipe's section, e.g. flip_average=True.
    """
    recipe = parse_recipe(
        json.dumps(
            {
                "run": {"name": folder.name, "folder": str(folder.parent)},
                "data": {"path": str(data), "resolution": RESOLUTION, "global_batch_size": 32},
                "model": model,
                "optimizer": {"name": "adamw", "peak_lr": 0.003},
                "schedule": {"phases": [{"epochs": 6, "kind": "constant"}]},
                "validation": validation,
            }
        )
    )
    manifest = load_manifest(data)
    torch.manual_seed(0)
    network = build_model(recipe.model, manifest.num_classes)
    normalize = Normalize(manifest.mean, manifest.std, recipe.model.channels_last)
    stored = StoredImages(data, "train")
    steps_of = Preprocessing(RESOLUTION, 0.875, manifest.mean, manifest.std)
    images = torch.from_numpy(
        np.stack([steps_of(stored.jpeg(sample_id), Limits()) for sample_id in range(len(stored.index))])
    )
    labels = torch.from_numpy(stored.index["label"].astype(np.int64))
    optimizer = torch.optim.AdamW(network.parameters(), 0.003)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(labels), (32,))
        loss = functional.cross_entropy(network(normalize(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {
        "version": CHECKPOINT_VERSION,
        "model": network.state_dict(),
        "optimizer": {},
        "schedule": {},
        "progress": {"epoch": 6, "step": steps},
        "recipe": dump_recipe(recipe),
        "class_names": list(manifest.class_names),
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "headline_weights": "model",
        "data_identity": manifest.splits["train"].index.sha256,
    }
    inside = folder / "checkpoints"
    inside.mkdir(parents=True)
    torch.save(state, inside / "best.pt")
    content = (inside / "best.pt").read_bytes()
    name = f"step-{steps:08d}.pt"
    (inside / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entry = {"name": name, "step": steps, "sha256": digest, "bytes": len(content)}
    (inside / "manifest.json").write_text(json.dumps({"checkpoints": [entry], "best": name}))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    summary = {
        "final_top1": 0.75,
        "final_top5": 1.0,
        "best_top1": 0.75,
        "best_epoch": 6,
        "validation": f"{RESOLUTION} px, crop 0.875",
        "epochs": 6,
        "world_size": 1,
        "num_parameters": num_parameters(network),
        "images_per_second": 100.0,
        "wall_seconds": 36.0,
        "cost_usd": 0.05,
        "mlflow_run_id": None,
        "checkpoint_sha256": digest,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text('{"step": 30}\n')
    return folder
