"""The state of a training on one rank: its parts, and how far it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data_prep.manifest import Manifest
from train.checkpoint import Cadence, CheckpointEntry, CheckpointMirror, CheckpointWriter
from train.config import Recipe
from train.cost import Budget, Price
from train.damage import DamageLog
from train.data.batch import Normalize
from train.data.device_augment import DeviceAugment
from train.data.folds import fold_identity
from train.data.loaders import Loader
from train.data.order import num_steps_per_epoch
from train.distributed import Ranks
from train.ema import Ema
from train.loss import TrainingLoss
from train.preemption import StopFlag
from train.profiler import StepProfiler
from train.schedule import EarlyStopping, Schedule
from train.startup import Startup
from train.teacher import Teacher
from train.throughput import Throughput, flops_per_image, peak_flops
from train.tracking.console import Console
from train.tracking.metrics_file import MetricsFile
from train.tracking.mlflow_run import MlflowRun
from train.tracking.tensorboard import TensorBoardWriter
from train.update import Updater
from train.validation import View


@dataclass
class Progress:
    """How far a run is; all of it is in the checkpoint."""

    step: int = 0
    epoch: int = 0
    samples_in_epoch: int = 0
    elapsed_seconds: float = 0.0
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    wait_seconds: float = 0.0
    train_images: int = 0
    best_top1: float = -1.0
    best_top5: float = 0.0
    best_epoch: int = 0
    final_top1: float = 0.0
    final_top5: float = 0.0
    views: dict[str, dict[str, float]] = field(default_factory=dict)  # name → top1, top5, loss, at the end
    skipped_steps: int = 0
    num_steps: int = 0  # where a budget shortened the run, else 0
    shortened_for_seconds: float = 0.0  # that budget
    stopped_because: str = ""  # why the last epoch was the last, where it is not the recipe's
    mlflow_run_id: str | None = None
    weights_at_start: str = ""  # of the first start: random, pretrained or checkpoint
    weights_note: str = ""  # the same as a sentence


@dataclass
class Run:
    """The parts of a training on this rank."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    manifest: Manifest
    precision: str
    model: nn.Module  # unwrapped
    trained: nn.Module  # the same, compiled and wrapped for DDP
    head: list[nn.Module]
    trainable: str | tuple[str, ...]  # what the current phase trains
    normalize: Normalize
    augment: DeviceAugment
    loss: TrainingLoss
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    updater: Updater
    ema: Ema | None
    schedule: Schedule
    early_stopping: EarlyStopping | None
    autocast: torch.autocast
    train_loader: Loader
    val_loaders: dict[float, Loader]  # by crop ratio
    views: list[View]
    damage: DamageLog
    stop: StopFlag
    clock: Throughput
    console: Console
    metrics: MetricsFile
    profiler: StepProfiler
    price: Price | None
    budget: Budget
    cadence: Cadence
    window: torch.Tensor  # sums since the last log line: loss, top-1, top-5, images; on the device
    latest: CheckpointEntry | None = None  # that this start goes on from
    progress: Progress = field(default_factory=Progress)
    startup: Startup = field(default_factory=Startup)
    writer: CheckpointWriter | None = None  # of the primary rank
    mirror: CheckpointMirror | None = None  # of the primary rank, where the recipe has one
    mlflow: MlflowRun | None = None
    tensorboard: TensorBoardWriter | None = None  # of the primary rank, where the recipe wants it
    learning_rate: float = 0.0  # of the current step
    num_done: int = 0  # steps of this start
    began: float = field(default_factory=time.monotonic)
    flops: dict[int, float | None] = field(default_factory=dict)  # resolution → FLOPs an image

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.train_loader.num_samples, self.recipe.data.global_batch_size)

    @property
    def resolution(self) -> int:
        """Training resolution of the current epoch, in pixels."""
        return self.resolution_at(self.progress.epoch)

    def resolution_at(self, epoch: int) -> int:
        """Training resolution of an epoch in pixels; in a shortened run that of the recipe's like epoch."""
        step = self.schedule.virtual_step(epoch * self.steps_per_epoch)
        return self.recipe.data.resolution_at(int(step / self.steps_per_epoch))

    @property
    def num_steps(self) -> int:
        return self.progress.num_steps or self.recipe.num_epochs * self.steps_per_epoch

    @property
    def num_epochs(self) -> int:
        """With the last one, of which a shortened run may see a part."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    @property
    def seconds_per_area(self) -> float:
        """Time for an epoch of images of one pixel, by all epochs so far, with their validations; or 0."""
        progress = self.progress
        busy = progress.train_seconds + progress.validation_seconds + self.clock.seconds
        done = self._area_until(progress.step)
        return busy / done if done else 0.0

    @property
    def remaining_seconds(self) -> float:
        """An estimate, by the pixels that were and that are to be trained on."""
        return self.seconds_per_area * (
            self._area_until(self.num_steps) - self._area_until(self.progress.step)
        )

    def _area_until(self, step: int) -> float:
        """Pixels of an image, summed over the epochs up to a step, the last one in part."""
        epochs = step / self.steps_per_epoch
        return sum(
            self.resolution_at(epoch) ** 2 * min(1.0, epochs - epoch) for epoch in range(math.ceil(epochs))
        )

    @property
    def flops_per_image(self) -> float | None:
        """Of the current resolution; counted once, and only where there is a peak to compare it with."""
        if self.peak_flops is None:
            return None
        if self.resolution not in self.flops:
            self.flops[self.resolution] = flops_per_image(self.model, self.resolution)
        return self.flops[self.resolution]

    @property
    def peak_flops(self) -> float | None:
        return peak_flops(self.ranks.device, self.precision)

    @property
    def data_identity(self) -> str:
        """Equal where two data sets have the same samples with the same ids."""
        return self.manifest.splits["train"].index.sha256

    @property
    def fold_identity(self) -> list[int] | None:
        """Equal where two runs hold out the same part of the train split; None: they hold out nothing."""
        return fold_identity(self.recipe.data)

    @property
    def elapsed_seconds(self) -> float:
        """Wall time of this run, those before a restart included."""
        return self.progress.elapsed_seconds + time.monotonic() - self.began

    @property
    def cost_usd(self) -> float | None:
        return None if self.price is None else self.price.cost_usd(self.elapsed_seconds)

    @property
    def epoch_cost_usd(self) -> float | None:
        """What an epoch has cost on average, all that belongs to it included."""
        epochs = self.progress.step / self.steps_per_epoch
        return None if self.cost_usd is None or not epochs else self.cost_usd / epochs

    @property
    def estimated_cost_usd(self) -> float | None:
        """What the whole run will cost, by its speed so far."""
        return (
            None if self.price is None else self.price.cost_usd(self.elapsed_seconds + self.remaining_seconds)
        )

    def average_buffers(self) -> None:
        """Make BatchNorm statistics, those of the averaged weights too, equal on all ranks."""
        self.ranks.average_buffers(self.model)
        if self.ema is not None:
            self.ranks.average_buffers(self.ema.model)
