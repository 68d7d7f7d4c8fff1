"""Loader alone and model alone, in images a second of one rank; every measurement has its time given.

Example:
    >>> with contextlib.closing(build_loader("auto", shortened(plan))) as loader:
    ...     loader_rate(loader, resolution=224, seconds=2)
    >>> model_rate(lambda size: training_step(recipe, model, …, size, device), 256, device, seconds=2)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from train.config import Recipe
from train.data.batch import Batch, Normalize, Targets
from train.data.device_augment import DeviceAugment
from train.data.loaders import Loader, LoaderPlan
from train.data.loaders.reference import ReferenceLoader
from train.loss import TrainingLoss
from train.models.heads import head_of
from train.optim import build_optimizer, set_learning_rate
from train.precision import build_autocast, build_scaler, choose_precision

NUM_WINDOWS = 3
SHORT_BATCH = 64  # images, or 8 a worker
SHORTEST_BATCH = 8
PROBE_BATCH = 4
NUM_WARM_UP_STEPS = 3


def shortened(plan: LoaderPlan) -> LoaderPlan:
    """The same samples in batches so short that several of each worker fit into a measurement.

    Decoding costs the same an image; but a worker process makes a whole batch at a time.
    """
    counts = plan.manifest.splits[plan.split].class_counts
    num_samples = sum(counts if plan.fold is None else plan.fold.class_counts(counts))
    # Of a small split, too, every worker gets a few.
    few = num_samples // (plan.world_size * plan.grad_accum_steps * 4 * max(1, plan.num_workers))
    size = max(SHORTEST_BATCH, min(few, max(SHORT_BATCH, 8 * plan.num_workers)))
    size = min(plan.batch_size, size)
    return replace(plan, batch_size=size, global_batch_size=size * plan.world_size * plan.grad_accum_steps)


def loader_rate(loader: Loader, resolution: int, seconds: float, num_windows: int = NUM_WINDOWS) -> float:
    """Median over windows of `seconds` each, or an epoch where that is shorter, after one that warms up.

    All windows see the same first batches of epoch 0, so from the second on they come out of the page cache.
    """
    _, most = _window(loader, resolution, seconds, None)
    return statistics.median(_window(loader, resolution, seconds, most)[0] for _ in range(num_windows))


def _window(loader: Loader, resolution: int, seconds: float, most: int | None) -> tuple[float, int]:
    """(images a second, batches taken) of up to `most` batches; None: of the epoch's."""
    in_epoch = _num_batches(loader.plan, loader.num_samples)
    most = in_epoch if most is None else most
    # Worker processes finish their batches almost together: count whole rounds, after the first.
    in_processes = isinstance(loader, ReferenceLoader)
    a_round = max(1, loader.plan.num_workers) if in_processes else 1
    skipped = a_round if most >= 2 * a_round else 0
    images = measured = taken = 0
    elapsed = 0.0
    begin = time.perf_counter()
    batches = cast(Generator[Batch], loader.epoch(0, resolution=resolution))
    with contextlib.closing(batches):
        for batch in batches:
            taken += 1
            if taken <= skipped:
                begin = time.perf_counter()
                continue
            images += len(batch)
            now = time.perf_counter() - begin
            if not skipped or (taken - skipped) % a_round == 0 or taken == most:
                measured, elapsed = images, now
                # An epoch that is over ends by itself; left early, worker processes would have to start anew.
                if taken < in_epoch and (now >= seconds or taken >= most):
                    break
    return measured / max(elapsed, 1e-9), taken


def _num_batches(plan: LoaderPlan, num_samples: int) -> int:
    if plan.is_training:
        return num_samples // plan.global_batch_size * plan.grad_accum_steps
    return math.ceil(math.ceil(num_samples / plan.batch_size) / plan.world_size)


@dataclass(frozen=True)
class Step:
    """Something to time.

    Attributes:
        compute: forward and backward of a micro-batch (in validation: forward).
        update: the optimizer step that comes after every `accum_steps` of them (in validation: nothing).
    """

    compute: Callable[[], None]
    update: Callable[[], None]
    accum_steps: int = 1


def training_step(
    recipe: Recipe,
    model: nn.Module,
    normalize: Normalize,
    num_classes: int,
    resolution: int,
    micro_batch_size: int,
    device: torch.device,
) -> Step:
    """Forward, backward and update on synthetic uint8 images that are on the device. Changes the weights."""
    images, labels = _synthetic(micro_batch_size, resolution, num_classes, device)
    precision = choose_precision(recipe.precision.mode, device)
    autocast, scaler = build_autocast(precision, device), build_scaler(precision, device)
    augment = DeviceAugment(recipe.augmentation, (0.5, 0.5, 0.5))
    # Weights of classes change no speed, and a teacher is not loaded for a few seconds.
    loss = TrainingLoss(
        recipe.loss.model_copy(update={"class_weights": None, "distillation": None}), num_classes
    )
    try:
        head = head_of(model)
    except ValueError:
        head = []  # of a model that is no classifier of ours: rates by layer change no speed
    optimizer = build_optimizer(model, recipe.optimizer, head)
    set_learning_rate(optimizer, 1e-6, None)  # noise cannot be learned: at full rate it diverges
    accum_steps = recipe.data.accum_steps
    model.train()

    def compute() -> None:
        pixels, targets = (images, Targets(labels)) if augment.is_identity else augment(images, labels, 0)
        with autocast:
            output = model(normalize(pixels))
        scaler.scale(loss(output, targets)[0] / accum_steps).backward()

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Step(compute, update, accum_steps)


def validation_step(
    recipe: Recipe,
    model: nn.Module,
    normalize: Normalize,
    resolution: int,
    batch_size: int,
    device: torch.device,
) -> Step:
    """Forward only, in evaluation mode."""
    images, _ = _synthetic(batch_size, resolution, 2, device)
    autocast = build_autocast(choose_precision(recipe.precision.mode, device), device)
    model.eval()

    def compute() -> None:
        with torch.inference_mode(), autocast:
            model(normalize(images))

    return Step(compute, lambda: None)


def _synthetic(
    size: int, resolution: int, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (size, resolution, resolution, 3), dtype=torch.uint8, device=device)
    return images, torch.randint(0, num_classes, (size,), device=device)


def model_rate(
    build: Callable[[int], Step], micro_batch_size: int, device: torch.device, seconds: float
) -> float:
    """Images a second of whole steps, in about `seconds`, the first ones left out.

    A CPU that is slow for its micro-batch is measured with a smaller one, of at least two images, and the
    update counted as often as the recipe has it.

    Args:
        build: makes the step for micro-batches of so many images.

    Raises:
        RuntimeError: the model failed; torch.OutOfMemoryError is one.
    """
    if device.type == "cuda":
        return _cuda_rate(build(micro_batch_size), micro_batch_size, device, seconds)
    size = min(PROBE_BATCH, micro_batch_size)
    step = build(size)
    # As large as time allows: a small batch pays most for starting threads and waiting for the slowest.
    while size < micro_batch_size and (growth := int(seconds / _cpu_seconds(step, 0.0)[0])) > 1:
        size = min(micro_batch_size, size * min(growth, PROBE_BATCH))
        step = build(size)
    compute, update = _cpu_seconds(step, seconds)
    return 1 / (compute / size + update / (step.accum_steps * micro_batch_size))


def _cuda_rate(step: Step, micro_batch_size: int, device: torch.device, seconds: float) -> float:
    def whole_step() -> None:
        for _ in range(step.accum_steps):
            step.compute()
        step.update()

    for _ in range(NUM_WARM_UP_STEPS):
        whole_step()
    rates = []
    for _ in range(NUM_WINDOWS):
        torch.cuda.synchronize(device)
        begin, num_steps = time.perf_counter(), 0
        # Queued without waiting, as in training; but not further ahead than the next look at the clock.
        while num_steps == 0 or time.perf_counter() - begin < seconds / NUM_WINDOWS:
            whole_step()
            num_steps += 1
            if num_steps % NUM_WARM_UP_STEPS == 0:
                torch.cuda.synchronize(device)
        torch.cuda.synchronize(device)
        images = num_steps * step.accum_steps * micro_batch_size
        rates.append(images / (time.perf_counter() - begin))
    return statistics.median(rates)


def _cpu_seconds(step: Step, seconds: float) -> tuple[float, float]:
    """Median seconds of (a computation, an update); the first of both only warms up."""
    computing, updating = [], []
    end = None
    while end is None or len(computing) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        step.compute()
        middle = time.perf_counter()
        step.update()
        computing.append(middle - begin)
        updating.append(time.perf_counter() - middle)
        if end is None:
            end = time.perf_counter() + seconds
    return statistics.median(computing[1:]), statistics.median(updating[1:])
