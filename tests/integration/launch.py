"""Starting the project's commands as a user would, on a tiny recipe."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.integration.command_nursery import Nursery, NurseryCommand

STARTS_ANEW = os.environ.get("COMMANDS_ANEW") == "1" or not sys.platform.startswith("linux")

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


@functools.cache
def nursery() -> Nursery:
    """Of this process of pytest; started when it is first asked for."""
    return Nursery(environment())


def popen(words: list[str], **pipes: Any) -> subprocess.Popen[str]:
    """A command, and its ranks, in forks of a process that has done its imports; see command_nursery."""
    variables = environment()
    if not STARTS_ANEW and nursery().can_run(variables):
        return NurseryCommand(nursery(), words, variables, **pipes)
    return subprocess.Popen(words, cwd=ROOT, env=variables, text=True, **pipes)


def run(*words: str, num_ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    started = command(*words, num_ranks=num_ranks)
    with popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(started, process.returncode, stdout, stderr)


def start(*words: str, num_ranks: int = 1) -> subprocess.Popen[str]:
    return popen(command(*words, num_ranks=num_ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def start_anew(*words: str, num_ranks: int = 1, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """As a user does, and with options for torchrun: nothing is imported beforehand."""
    started = command(*words, num_ranks=num_ranks)
    return subprocess.Popen(
        [*started[:3], *options, *started[3:]],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
