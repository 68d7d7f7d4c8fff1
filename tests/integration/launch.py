"""Starting the project's commands as a user would, on a tiny recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

TINY_RECIPE = """
data: {path: DATA, loader: reference, num_workers: 0, global_batch_size: 24, resolution: 32}
model: {library: timm, name: test_resnet}
optimizer: {name: sgd, peak_lr: 0.05}
loss: {label_smoothing: 0.1}
schedule: {phases: [{kind: one_cycle, epochs: 2}, {kind: plateau, epochs: 1, initial_lr_fraction: 0.05}]}
validation: {batch_size: 10, crop_ratio: 1.0}
precision: {mode: fp32}
run: {log_every_steps: 2, preflight: false}
tracking: {mlflow: false}
"""


def write_recipe(folder: Path, data: Path, **changes: str) -> Path:
    text = TINY_RECIPE.replace("DATA", str(data))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def command(*words: str, num_ranks: int = 1) -> list[str]:
    if num_ranks == 1:
        return [sys.executable, "-m", *words]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    return [sys.executable, "-m", *launcher, *words]


def environment() -> dict[str, str]:
    # One thread a rank: on two cores, more ranks with more threads would only wait for each other.
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def run(*words: str, num_ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words, num_ranks=num_ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(*words: str, num_ranks: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words, num_ranks=num_ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
