"""Building the parts of a training from its recipe, and taking them up from a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.manifest import Manifest, load_manifest
from train.check import split_faults
from train.checkpoint import Cadence, CheckpointStore
from train.config import ModelSection, Recipe
from train.cost import Budget, find_price
from train.damage import DamageLog
from train.data.batch import Normalize, normalization_statistics
from train.data.device_augment import DeviceAugment
from train.data.folds import class_counts_of
from train.data.loaders import Loader, LoaderPlan, build_loader, choose_backend
from train.data.order import check_batch_size, num_steps_per_epoch
from train.distributed import Ranks, describe_hardware
from train.ema import Ema
from train.loss import TrainingLoss
from train.micro_batch import resolve_grad_accum_steps
from train.models.build import build_model, note_weights, num_parameters
from train.models.heads import head_of, init_bce_bias
from train.models.sync_batchnorm import convert_sync_batchnorm
from train.optim import build_optimizer, scaled_peak_lr
from train.param_groups import Trainable, freeze_statistics, set_trainable, trainable_fault
from train.precision import build_autocast, build_scaler, choose_precision, set_matmul_precision
from train.preemption import StopFlag
from train.profiler import StepProfiler
from train.run import Progress, Run
from train.run_folder import METRICS_NAME
from train.schedule import EarlyStopping, Schedule
from train.teacher import Teacher
from train.throughput import Throughput
from train.tracking.console import Console
from train.tracking.metrics_file import MetricsFile
from train.tracking.tensorboard import require_tensorboard
from train.update import Updater
from train.validation import View, views_of


def build_run(
    recipe: Recipe, folder: Path, data: Path, ranks: Ranks, stop: StopFlag, console: Console
) -> Run:
    """Everything a training needs, weights at their seeded start.

    Args:
        folder: of the run. data: of the shards, on a disk of this machine.

    Raises:
        ValueError: recipe and data do not go together, or no checkpoint is whole; on every rank.
        StopWanted: a rank was asked to stop while weights were downloaded; on every rank.
    """
    manifest = ranks.on_primary(lambda: _checked_manifest(recipe, data, ranks))
    device, num_classes = ranks.device, manifest.num_classes
    precision = choose_precision(recipe.precision.mode, device)
    set_matmul_precision(precision)
    torch.backends.cudnn.benchmark = True  # shapes are the same in every step of an epoch
    torch.manual_seed(recipe.run.seed)
    store = CheckpointStore(folder / "checkpoints")
    latest = ranks.on_primary(lambda: store.latest(console.say))
    model = build_on_ranks(recipe.model, num_classes, latest is not None, ranks, lambda: stop.is_raised)
    if recipe.loss.kind == "bce":
        init_bce_bias(model, num_classes)
    if recipe.model.sync_batchnorm:
        model = convert_sync_batchnorm(model, device)
    head = head_of(model)
    if fault := trainable_fault(model, head, recipe.schedule.phases):
        raise ValueError(fault)  # now, and not when the phase begins, after others were paid for
    statistics = normalization_statistics(recipe.data.normalization, manifest.mean, manifest.std)
    normalize = Normalize(*statistics, channels_last=recipe.model.channels_last).to(device)
    distillation, early = recipe.loss.distillation, recipe.schedule.early_stopping
    teacher = None if distillation is None else Teacher(distillation.teacher, manifest.class_names, device)
    recipe = _with_micro_batches(recipe, folder, model, normalize, num_classes, ranks)
    training = LoaderPlan.training(data, manifest, recipe.data, recipe.run.seed, ranks)
    views = views_of(recipe)
    train_loader = build_loader(recipe.data.loader, training)
    val_loaders = _build_val_loaders(recipe, data, manifest, views, ranks)
    peak_lr = scaled_peak_lr(recipe.optimizer, recipe.data.global_batch_size)
    optimizer = build_optimizer(model, recipe.optimizer, head, peak_lr)
    scaler = build_scaler(precision, device)
    price = find_price(recipe.budget)
    steps_per_epoch = num_steps_per_epoch(train_loader.num_samples, recipe.data.global_batch_size)
    class_counts = class_counts_of(manifest, recipe.data)["train"]
    loaders = {"train": train_loader, "val": val_loaders[views[0].crop_ratio]}
    run = Run(
        recipe=recipe,
        folder=folder,
        ranks=ranks,
        manifest=manifest,
        precision=precision,
        model=model,
        trained=model,
        head=head,
        trainable="all",
        normalize=normalize,
        augment=DeviceAugment(recipe.augmentation, manifest.mean),
        loss=TrainingLoss(recipe.loss, num_classes, class_counts).to(device),
        teacher=teacher,
        optimizer=optimizer,
        scaler=scaler,
        updater=Updater(model, head, optimizer, scaler, recipe.optimizer, ranks),
        ema=None if recipe.ema is None else Ema(model, recipe.ema),
        schedule=Schedule(recipe.schedule, recipe.optimizer, steps_per_epoch, peak_lr),
        early_stopping=None if early is None else EarlyStopping(early),
        autocast=build_autocast(precision, device),
        train_loader=train_loader,
        val_loaders=val_loaders,
        views=views,
        damage=DamageLog(folder, ranks, loaders),
        stop=stop,
        clock=Throughput(ranks.world_size, device),
        console=console,
        metrics=MetricsFile(folder / METRICS_NAME, console.say),
        profiler=StepProfiler(recipe.profile, folder, ranks.rank, device),
        price=price,
        budget=Budget(recipe.budget, price),
        cadence=Cadence(recipe.checkpoint),
        window=torch.zeros(4, dtype=torch.float64, device=device),
        latest=latest,
        progress=Progress(weights_at_start=str(model.weights_at_start), weights_note=str(model.weights_note)),
    )
    train_part(run, run.schedule.trainable_at(0))
    _introduce(run)
    return run


def build_on_ranks(
    config: ModelSection,
    num_classes: int,
    goes_on: bool,
    ranks: Ranks,
    wants_to_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """The model on each rank's device, with the weights that a run begins with.

    The primary asks the hub, once for all machines, and the others get its weights. A run that goes on from
    a checkpoint has its own: those it began with are not needed, and may be gone.

    Raises:
        ValueError: as `build_model`, on every rank.
        StopWanted: on every rank, where one was asked to stop while weights were downloaded.
    """
    offline = config.model_copy(update={"pretrained": False})
    if goes_on:
        model = build_model(offline.model_copy(update={"checkpoint": None}), num_classes)
        note_weights(model, "", "weights of its checkpoint")
        return model.to(ranks.device)
    if not config.asks_hub:
        return build_model(config, num_classes).to(ranks.device)
    built: list[nn.Module] = []

    def ask_hub() -> tuple[Any, ...]:
        built.append(build_model(config, num_classes))
        return built[0].weights_at_start, built[0].weights_note

    origin = ranks.on_primary_in_thread(ask_hub, wants_to_stop)
    model = (built[0] if built else build_model(offline, num_classes)).to(ranks.device)
    note_weights(model, *origin)
    ranks.broadcast_weights(model)
    return model


def _with_micro_batches(
    recipe: Recipe, folder: Path, model: nn.Module, normalize: Normalize, num_classes: int, ranks: Ranks
) -> Recipe:
    """The recipe with a number for `data.grad_accum_steps`."""
    steps = resolve_grad_accum_steps(recipe, folder, model, normalize, num_classes, ranks)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"grad_accum_steps": steps})})


def _build_val_loaders(
    recipe: Recipe, data: Path, manifest: Manifest, views: Sequence[View], ranks: Ranks
) -> dict[float, Loader]:
    loaders = {}
    for ratio in dict.fromkeys(view.crop_ratio for view in views):
        section = recipe.validation.model_copy(update={"crop_ratio": ratio})
        plan = LoaderPlan.held_out(data, manifest, section, recipe.data, ranks)
        loaders[ratio] = build_loader(recipe.data.loader, plan)
    return loaders


def train_part(run: Run, trainable: str | tuple[str, ...]) -> None:
    """Freeze and unfreeze for a phase, and wrap the model anew: DDP reduces what needed gradients then."""
    set_trainable(run.model, cast(Trainable, trainable), run.head)
    run.trainable = trainable
    run.trained = wrap(run.model, run.recipe.model, run.ranks)
    set_training_mode(run)


def set_training_mode(run: Run) -> None:
    run.trained.train()
    freeze_statistics(run.model)


def wrap(model: nn.Module, config: ModelSection, ranks: Ranks) -> nn.Module:
    """Compiled, then wrapped for DDP, both where wanted; parameters and their names stay the model's own."""
    trained = model
    if config.compile:
        mode = None if config.compile is True else config.compile
        trained = cast(nn.Module, torch.compile(model, mode=mode, dynamic=False))
    return wrap_for_ddp(trained, ranks) if ranks.world_size > 1 else trained


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
    check_batch_size(recipe.data.global_batch_size, recipe.data.accum_steps, ranks.world_size)
    if recipe.tracking.tensorboard:
        require_tensorboard()
    return manifest


def _introduce(run: Run) -> None:
    recipe, manifest, data = run.recipe, run.manifest, run.recipe.data
    backend, reason = choose_backend(data.loader, manifest.format)
    held_out = "val" if data.fold is None else f"val (fold {data.fold} of {data.folds})"
    val_loader = next(iter(run.val_loaders.values()))
    counts = f"{run.train_loader.num_samples:,} train, {val_loader.num_samples:,} {held_out}"
    machine = f"{run.ranks.world_size} rank(s) on {describe_hardware(run.ranks)}"
    note = run.progress.weights_note
    micro = data.global_batch_size // (run.ranks.world_size * data.accum_steps)
    lines = [
        f"run {run.folder}: {recipe.model.library} {recipe.model.name} "
        f"({num_parameters(run.model) / 1e6:.1f} M parameters), {manifest.num_classes} classes, {counts} "
        f"images; {note}",
        f"{machine}, {run.precision}; loader {backend} ({reason})",
        f"{recipe.num_epochs} epochs × {run.steps_per_epoch} steps of {data.global_batch_size} at "
        f"{_sides(recipe)} px ({micro} images a rank and micro-batch, {data.accum_steps} a step)",
        f"peak_lr {run.schedule.peak_lr:.4g}{_scaling(recipe)}; validated at {run.views[0].words}; "
        + (f"${run.price.usd_per_hour:.2f} an hour ({run.price.source})" if run.price else "no price known"),
    ]
    run.console.say("\n  ".join(lines))
    if recipe.model.asks_hub and run.progress.weights_at_start == "random":
        run.console.say(f"warning: {note}; the published figures of this recipe are not to be expected")


def _scaling(recipe: Recipe) -> str:
    """How the rate came about, where it was scaled with the batch."""
    reference, batch = recipe.optimizer.peak_lr_batch_size, recipe.data.global_batch_size
    if reference is None or reference == batch:
        return ""
    return f" ({recipe.optimizer.peak_lr:g} at batch {reference}, scaled linearly to {batch})"


def _sides(recipe: Recipe) -> str:
    """`64`, or `128 → 160 → 192` where the resolution grows."""
    return " → ".join(str(side) for side in recipe.data.resolutions.values())
