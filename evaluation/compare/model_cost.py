"""What a network costs: parameters, FLOPs, file size, memory, speed of inference on this machine.

Example:
    >>> cost = static_cost(build_model(ModelSection(name="resnet18"), 1000), 224)
    >>> cost.forward_flops / 1e9, cost.forward_macs / 1e9
    (3.63, 1.81)
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import evaluation
from train.config import Recipe, dump_recipe
from train.models.build import num_parameters
from train.throughput import BACKWARD_AND_FORWARD, flops_per_image

BATCH_SIZES = (1, 64)
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class StaticCost:
    """What needs no clock; None where it cannot be counted.

    Attributes:
        forward_flops: of one image at `resolution` pixels: each multiplication and each addition counts, in
            convolutions and matrix products; so 2 × forward_macs.
        weights_bytes: of parameters and buffers as they are stored.
    """

    num_parameters: int
    resolution: int
    forward_flops: float | None
    weights_bytes: int

    @property
    def forward_macs(self) -> float | None:
        return None if self.forward_flops is None else self.forward_flops / 2


@dataclass(frozen=True)
class MeasuredCost:
    """What was measured here; None where it was not, with the reason in `notes`.

    Attributes:
        inference_memory_bytes, inference_seconds: batch size → peak memory; median seconds of a forward pass.
        training_memory_bytes: of a training step with micro_batch_size images.
    """

    inference_memory_bytes: dict[int, int | None]
    inference_seconds: dict[int, float]
    training_memory_bytes: int | None = None
    micro_batch_size: int | None = None
    notes: tuple[str, ...] = ()


NOTHING_MEASURED = MeasuredCost({}, {})


def static_cost(model: nn.Module, resolution: int) -> StaticCost:
    """Counted on the model itself; its weights and mode stay as they are."""
    flops = flops_per_image(model, resolution)
    tensors = [*model.parameters(), *model.buffers()]
    return StaticCost(
        num_parameters=num_parameters(model),
        resolution=resolution,
        forward_flops=None if flops is None else flops / BACKWARD_AND_FORWARD,
        weights_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def measure_cost(
    recipe: Recipe, num_classes: int, resolution: int, world_size: int, with_training: bool
) -> MeasuredCost:
    """Each measurement in a process of its own; one that fails leaves a note.

    Args:
        resolution: of the validation, in pixels. world_size: ranks that the global batch was shared by.
        with_training: also the memory of a training step, at the largest resolution of the recipe.
    """
    text, notes = dump_recipe(recipe), []
    common = {"recipe": text, "num_classes": num_classes}
    inference = _probe({"kind": "inference", "resolution": resolution, "batch_sizes": BATCH_SIZES, **common})
    if fault := inference.get("fault"):
        notes.append(f"Its inference could not be measured: {fault}.")
    training: dict[str, Any] = {}
    micro_batch_size = max(1, recipe.data.global_batch_size // (world_size * recipe.data.accum_steps))
    if with_training:
        side = max(recipe.data.resolutions.values())
        task = {"kind": "training", "resolution": side, "micro_batch_size": micro_batch_size, **common}
        training = _probe(task)
        if fault := training.get("fault"):
            notes.append(f"The memory of its training step could not be measured: {fault}.")
    return MeasuredCost(
        inference_memory_bytes={int(size): peak for size, peak in inference.get("memory_bytes", {}).items()},
        inference_seconds={int(size): seconds for size, seconds in inference.get("seconds", {}).items()},
        training_memory_bytes=training.get("memory_bytes"),
        micro_batch_size=micro_batch_size if training.get("memory_bytes") is not None else None,
        notes=tuple(notes),
    )


def _probe(task: dict[str, Any]) -> dict[str, Any]:
    """What `evaluation.compare.probe` answers; {"fault": …} where it did not."""
    root = Path(evaluation.__file__).parent.parent
    try:
        done = subprocess.run(
            [sys.executable, "-m", "evaluation.compare.probe"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            cwd=root,
        )
    except subprocess.TimeoutExpired:
        return {"fault": f"it took longer than {TIMEOUT_SECONDS / 60:.0f} minutes"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        return {"fault": last[:200]}
    return answer if isinstance(answer, dict) else {"fault": "it gave no answer"}
