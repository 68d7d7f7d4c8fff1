"""One measurement of one network in a process of its own, so that its memory is nobody else's.

Reads what to do as JSON from stdin and writes one line of JSON:

    echo '{"kind": "inference", "recipe": "…", "num_classes": 6, "resolution": 96, "batch_sizes": [1, 64]}' |
        python -m evaluation.compare.probe

On a CPU, memory is the peak of the process's resident set (VmHWM) above what it was before the network was
built, after a small network has made the libraries load; on CUDA `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.config import Recipe, parse_recipe
from train.data.batch import Normalize
from train.data.preflight.machine import usable_ram_bytes
from train.data.preflight.measure import training_step, validation_step
from train.models.build import build_model

PASSES_LEAST, PASSES_MOST = 5, 60
SECONDS = 3.0  # of timed passes a batch size, where the least number of passes takes no longer
USABLE_FRACTION = 0.85


def main() -> int:
    task = json.loads(sys.stdin.read())
    recipe = parse_recipe(task["recipe"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    _load_libraries(device)
    _bound_memory(device)
    measure = {"inference": _measure_inference, "training": _measure_training}[task["kind"]]
    try:
        result = measure(recipe, task, device)
    except torch.OutOfMemoryError:
        result = {"fault": "the memory of this machine is too small for it"}
    except RuntimeError as error:
        text = str(error)
        is_memory = "allocate memory" in text
        result = {"fault": "the memory of this machine is too small for it" if is_memory else text[:200]}
    print(json.dumps(result))
    return 0


def _measure_inference(recipe: Recipe, task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Peak memory and median seconds of a forward pass, for each batch size in rising order."""
    before = _begin_memory(device)
    model, normalize = _build(recipe, task["num_classes"], device)
    memory, seconds = {}, {}
    for size in sorted(task["batch_sizes"]):
        step = validation_step(recipe, model, normalize, task["resolution"], size, device)
        seconds[str(size)] = _median_seconds(step.compute, device)
        memory[str(size)] = _peak_bytes(device, before)
    return {"memory_bytes": memory, "seconds": seconds}


def _measure_training(recipe: Recipe, task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Peak memory of two steps: in the second one the optimizer has its state."""
    before = _begin_memory(device)
    model, normalize = _build(recipe, task["num_classes"], device)
    average = copy.deepcopy(model) if recipe.ema is not None else None
    size = task["micro_batch_size"]
    step = training_step(recipe, model, normalize, task["num_classes"], task["resolution"], size, device)
    for _ in range(2):
        step.compute()
        step.update()
    del average
    return {"memory_bytes": _peak_bytes(device, before)}


def _build(recipe: Recipe, num_classes: int, device: torch.device) -> tuple[nn.Module, Normalize]:
    """With random weights: neither memory nor speed depends on their values."""
    config = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    normalize = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), channels_last=recipe.model.channels_last)
    return build_model(config, num_classes).to(device), normalize.to(device)


def _median_seconds(compute: Callable[[], None], device: torch.device) -> float:
    """Median of at least PASSES_LEAST passes, after two that warm up."""

    def timed() -> float:
        begin = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed(), timed()
    passes: list[float] = []
    while len(passes) < PASSES_LEAST or (sum(passes) < SECONDS and len(passes) < PASSES_MOST):
        passes.append(timed())
    return statistics.median(passes)


def _load_libraries(device: torch.device) -> None:
    """What the first convolution brings into memory belongs to no network."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    small.to(device)(torch.randn(2, 3, 8, 8, device=device)).sum().backward()


def _bound_memory(device: torch.device) -> None:
    """On a CPU: a network that does not fit gets an error, and not the whole machine into trouble."""
    usable, held = usable_ram_bytes(), _status_bytes("VmData:")
    if device.type == "cpu" and usable is not None and held is not None:
        most = held + int(USABLE_FRACTION * usable)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard < 0 else min(most, hard), hard))


def _begin_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return _status_bytes("VmHWM:")
    return _status_bytes("VmRSS:")


def _peak_bytes(device: torch.device, before: int | None) -> int | None:
    """None where the system does not tell."""
    if device.type == "cuda":
        peak: int | None = torch.cuda.max_memory_allocated(device)
    else:
        peak = _status_bytes("VmHWM:")
    return None if peak is None or before is None else max(0, peak - before)


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


if __name__ == "__main__":
    sys.exit(main())
