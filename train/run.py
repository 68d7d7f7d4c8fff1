"""The parts of a training on one rank: built from the recipe, and taken up from a checkpoint."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.manifest import Manifest, load_manifest
from train.check import split_faults
from train.checkpoint import CheckpointStore
from train.config import Recipe, flatten
from train.cost import Price, find_price
from train.damage import DamageLog
from train.data.batch import Normalize, normalization_statistics
from train.data.loaders import Loader, LoaderPlan, build_loader, choose_backend
from train.data.order import check_batch_size, num_steps_per_epoch
from train.distributed import Ranks, describe_hardware
from train.models.build import build_model, num_parameters
from train.optim import build_optimizer
from train.precision import build_autocast, build_scaler, choose_precision
from train.preemption import StopFlag
from train.run_folder import METRICS_NAME
from train.schedule import Schedule
from train.throughput import Throughput
from train.tracking.console import Console
from train.tracking.metrics_file import MetricsFile
from train.tracking.mlflow_run import MlflowRun


@dataclass
class Progress:
    """How far a run is; all of it is in the checkpoint."""

    step: int = 0
    epoch: int = 0
    samples_in_epoch: int = 0
    elapsed_seconds: float = 0.0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    train_images: int = 0
    best_top1: float = -1.0
    best_top5: float = 0.0
    best_epoch: int = 0
    final_top1: float = 0.0
    final_top5: float = 0.0
    mlflow_run_id: str | None = None


@dataclass
class Run:
    """The parts of a training on this rank."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    manifest: Manifest
    model: nn.Module  # unwrapped
    trained: nn.Module  # the same, wrapped for DDP
    normalize: Normalize
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    autocast: torch.autocast
    train_loader: Loader
    val_loader: Loader
    damage: DamageLog
    stop: StopFlag
    clock: Throughput
    console: Console
    metrics: MetricsFile
    price: Price | None
    window: torch.Tensor  # sums since the last log line: loss, top-1, top-5, images; on the device
    progress: Progress = field(default_factory=Progress)
    mlflow: MlflowRun | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.train_loader.num_samples, self.recipe.data.global_batch_size)

    @property
    def resolution(self) -> int:
        """Training resolution of the current epoch, in pixels."""
        return self.recipe.data.resolution_at(self.progress.epoch)

    @property
    def data_identity(self) -> str:
        """Equal where two data sets have the same samples with the same ids."""
        return self.manifest.splits["train"].index.sha256

    @property
    def elapsed_seconds(self) -> float:
        """Wall time of this run, those before a restart included."""
        return self.progress.elapsed_seconds + time.monotonic() - self.began

    @property
    def cost_usd(self) -> float | None:
        return None if self.price is None else self.price.cost_usd(self.elapsed_seconds)


def build_run(
    recipe: Recipe, folder: Path, data: Path, ranks: Ranks, stop: StopFlag, console: Console
) -> Run:
    """Everything a training needs, weights at their seeded start.

    Args:
        folder: of the run. data: of the shards, on a disk of this machine.
    """
    manifest = ranks.on_primary(lambda: _checked_manifest(recipe, data, ranks))
    precision = choose_precision(recipe.precision.mode, ranks.device)
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.model, manifest.num_classes).to(ranks.device)
    trained: nn.Module = model
    if ranks.world_size > 1:
        trained = wrap_for_ddp(model, ranks)
    statistics = normalization_statistics(recipe.data.normalization, manifest.mean, manifest.std)
    training = LoaderPlan.training(data, manifest, recipe.data, recipe.run.seed, ranks)
    validation = LoaderPlan.validation(data, manifest, recipe.validation, recipe.data, ranks)
    train_loader = build_loader(recipe.data.loader, training)
    val_loader = build_loader(recipe.data.loader, validation)
    run = Run(
        recipe=recipe,
        folder=folder,
        ranks=ranks,
        manifest=manifest,
        model=model,
        trained=trained,
        normalize=Normalize(*statistics, channels_last=recipe.model.channels_last).to(ranks.device),
        criterion=nn.CrossEntropyLoss(label_smoothing=recipe.loss.label_smoothing),
        optimizer=build_optimizer(model, recipe.optimizer),
        scaler=build_scaler(precision, ranks.device),
        schedule=Schedule(
            recipe.schedule,
            recipe.optimizer,
            num_steps_per_epoch(manifest.splits["train"].num_samples, recipe.data.global_batch_size),
        ),
        autocast=build_autocast(precision, ranks.device),
        train_loader=train_loader,
        val_loader=val_loader,
        damage=DamageLog(folder, ranks, {"train": train_loader, "val": val_loader}),
        stop=stop,
        clock=Throughput(ranks.world_size),
        console=console,
        metrics=MetricsFile(folder / METRICS_NAME),
        price=find_price(recipe.budget),
        window=torch.zeros(4, dtype=torch.float64, device=ranks.device),
    )
    _introduce(run, precision)
    return run


def wrap_for_ddp(model: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    """Gradients are averaged over ranks; BatchNorm statistics only before they are used."""
    parameters = inspect.signature(DistributedDataParallel).parameters
    # The argument got a new name in torch 2.15, and the old one warns there.
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    no_buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **no_buffers,
    )


def _checked_manifest(recipe: Recipe, data: Path, ranks: Ranks) -> Manifest:
    manifest = load_manifest(data)
    if faults := split_faults(manifest, recipe):
        raise ValueError("; ".join(faults))
    check_batch_size(recipe.data.global_batch_size, recipe.data.grad_accum_steps, ranks.world_size)
    return manifest


def _introduce(run: Run, precision: str) -> None:
    recipe, manifest = run.recipe, run.manifest
    backend, reason = choose_backend(recipe.data.loader, manifest.format)
    counts = ", ".join(f"{entry.num_samples:,} {name}" for name, entry in manifest.splits.items())
    machine = f"{run.ranks.world_size} rank(s) on {describe_hardware(run.ranks)}"
    run.console.say(
        f"run {run.folder}: {recipe.model.library} {recipe.model.name} "
        f"({num_parameters(run.model) / 1e6:.1f} M parameters), {manifest.num_classes} classes, {counts} "
        f"images\n  {machine}, {precision}; loader {backend} "
        f"({reason})\n"
        f"  {recipe.num_epochs} epochs × {run.steps_per_epoch} steps of {recipe.data.global_batch_size} at "
        f"{_sides(recipe)} px, validated at {recipe.validation_resolution} px; "
        + (f"${run.price.usd_per_hour:.2f} an hour ({run.price.source})" if run.price else "no price known")
    )


def _sides(recipe: Recipe) -> str:
    """`64`, or `128 → 160 → 192` where the resolution grows."""
    return " → ".join(str(side) for side in recipe.data.resolutions.values())


def resume_or_start(run: Run) -> bool:
    """Go on from the newest whole checkpoint, or find a learning rate and begin; False on a signal."""
    store = CheckpointStore(run.folder / "checkpoints")
    name = run.ranks.on_primary(lambda: _latest_name(store, run.console))
    state: dict[str, Any] | None = None
    if name is not None:
        state = torch.load(store.folder / name, map_location="cpu", weights_only=True)
        load_state(run, state)
    if run.ranks.is_primary:
        run.metrics.cut_after(run.progress.step)
        if state is None:
            run.damage.start_over()
        if run.recipe.tracking.mlflow:
            run.mlflow = MlflowRun(
                run.recipe.tracking,
                run.recipe.run.folder,
                run.folder.name,
                run.progress.mlflow_run_id,
                run.console.say,
            )
            run.mlflow.log_parameters(flatten(run.recipe.model_dump(mode="json")))
            run.mlflow.set_tags(_tags(run))
    if state is not None:
        run.console.say(f"going on from {name}: epoch {run.progress.epoch + 1}, step {run.progress.step}")
    elif run.recipe.lr_finder.enabled:
        return run_lr_finder(run)
    return True


def _latest_name(store: CheckpointStore, console: Console) -> str | None:
    latest = store.load_latest(console.say)
    return None if latest is None else latest[0].name


def load_state(run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint into the parts of a run.

    Raises:
        ValueError: it was made with other classes.
    """
    if tuple(state["class_names"]) != run.manifest.class_names:
        raise ValueError(
            f"the checkpoint in {run.folder} was trained on other classes than {run.recipe.data.path} holds: "
            "choose another run.name"
        )
    if state.get("data_identity") != run.data_identity:
        raise ValueError(
            f"the checkpoint in {run.folder} was trained on another version of {run.recipe.data.path} (its "
            "samples or their order differ): choose another run.name, or go back to that data set"
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.schedule.load_state_dict(state["schedule"], run.optimizer)
    run.progress = Progress(**state["progress"])
    if run.ranks.is_primary:  # a sum over ranks was saved: one rank takes it up
        run.window += torch.tensor(state["window"], dtype=torch.float64, device=run.ranks.device)


def run_lr_finder(run: Run) -> bool:
    """Look for a learning rate, save curve and choice, and train with it where the recipe says so.

    Returns:
        False where a signal ended the search: nothing was trained, a new start begins again.
    """
    from train.lr_finder import find_learning_rate, save_result

    recipe = run.recipe
    result = find_learning_rate(
        nn.Sequential(run.normalize, run.trained),
        build_optimizer(run.model, recipe.optimizer),
        run.criterion,
        run.train_loader,
        recipe.lr_finder,
        resolution=recipe.data.resolution_at(0),
        grad_accum_steps=recipe.data.grad_accum_steps,
        precision=choose_precision(recipe.precision.mode, run.ranks.device),
        ranks=run.ranks,
        wants_to_stop=lambda: run.stop.is_raised,
    )
    if result is None:
        return False
    use = recipe.lr_finder.use and result.choice is not None
    if use and result.choice is not None:
        run.schedule.peak_lr = result.choice
    if run.ranks.is_primary:
        save_result(result, run.folder, run.schedule.peak_lr)
        found = "no choice" if result.choice is None else f"{result.choice:.3g}"
        run.console.say(
            f"learning-rate finder: {found} ({result.reason}); training with peak_lr "
            f"{run.schedule.peak_lr:.3g}" + ("" if use else " of the recipe")
        )
        if run.mlflow is not None:
            run.mlflow.log_metrics({"peak_lr": run.schedule.peak_lr}, 0)
            run.mlflow.log_file(run.folder / "lr_finder.png")
    return True


def _tags(run: Run) -> dict[str, str]:
    return {
        "dataset": run.recipe.data.name,
        "hardware": describe_hardware(run.ranks),
        "run_folder": str(run.folder.resolve()),
        "weights_at_start": "pretrained" if run.recipe.model.pretrained else "random",
        "price": run.price.source if run.price else "",
    }
