"""The training loop: data, forward, backward, update, and now and then a look at the validation split.

The one clock is `step`: global batches consumed. Everything that a run needs to go on is in the checkpoint;
learning rate, order and crops follow from the step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.storage import write_atomically
from train.checkpoint import CHECKPOINT_VERSION, CheckpointEntry, CheckpointStore
from train.config import Recipe, dump_recipe
from train.data.batch import Batch
from train.data.preflight import quick_preflight
from train.data.samples import NothingIntactError
from train.data.staging import staged_folder
from train.distributed import Ranks
from train.models.build import num_parameters
from train.preemption import StopFlag
from train.run import Run, build_run, resume_or_start
from train.run_folder import METRICS_NAME, SUMMARY_NAME, write_status
from train.tracking.console import Console, duration
from train.validation import ValidationResult, count_topk, validate

DAMAGED_DATA = "damaged data"
NON_FINITE = (
    "the loss became non-finite at about step {step}: lower optimizer.peak_lr, or use precision.mode=fp32; "
    "the last checkpoint is from before that"
)


def train(recipe: Recipe, folder: Path, ranks: Ranks) -> dict[str, Any] | None:
    """Train in `folder` from where it stands; the summary, or None after a planned stop.

    Raises:
        ValueError: recipe and data do not go together.
        RuntimeError: the loss became non-finite, or a sample is damaged.
    """
    stop = StopFlag(ranks)
    stop.install()  # first of all: what follows takes seconds, and staging perhaps an hour
    console = Console(ranks.is_primary)
    data = staged_folder(
        recipe.data.path, recipe.data.stage_folder, ranks, lambda: stop.is_raised, console.say
    )
    if data is None:
        leave_before_the_start(folder, stop, console)
        return None
    run = build_run(recipe, folder, data, ranks, stop, console)
    try:
        if not resume_or_start(run):
            leave_before_the_start(folder, stop, console)
            if run.mlflow is not None:
                run.mlflow.finish("KILLED")
            return None
        if recipe.run.preflight:
            say_preflight(run)
        while run.progress.epoch < recipe.num_epochs:
            reason = train_epoch(run)
            if reason == DAMAGED_DATA:
                end_for_damage(run)
            if reason is not None:
                stop_in_good_order(run, reason)
                return None
            finish_epoch(run)
        return finish_run(run)
    except BaseException as error:
        if isinstance(error, NothingIntactError) and ranks.world_size == 1:
            # With several ranks the others are in the middle of a step: there the last checkpoint stands.
            run.damage.gather()
            save(run, is_best=False)
        if run.mlflow is not None:
            run.mlflow.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        run.train_loader.close()
        run.val_loader.close()


def say_preflight(run: Run) -> None:
    """Measure on copies, for two seconds, whether data or model will be the limit."""
    line = quick_preflight(
        run.recipe, run.ranks, run.train_loader, run.model, run.normalize, resolution=run.resolution
    )
    run.console.say(f"  {line}")


def train_epoch(run: Run) -> str | None:
    """The rest of the current epoch; the reason to stop, or None at its end."""
    recipe, progress, ranks, device = run.recipe, run.progress, run.ranks, run.ranks.device
    accum_steps = recipe.data.grad_accum_steps
    run.trained.train()
    run.clock.reset()
    batches = run.clock.waiting(
        run.train_loader.epoch(progress.epoch, progress.samples_in_epoch, resolution=run.resolution)
    )
    for micro_batches in grouped(batches, accum_steps):
        learning_rate = run.schedule.begin_step(run.optimizer, progress.step)
        step_loss = torch.zeros((), device=device)
        seed_step(recipe.run.seed, progress.step, ranks.rank)
        for position, batch in enumerate(micro_batches):
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            with sync_gradients(run.trained, position == accum_steps - 1):
                with run.autocast:
                    logits = run.trained(run.normalize(images))
                logits = logits.float()
                loss = run.criterion(logits, labels)
                run.scaler.scale(loss / accum_steps).backward()
            step_loss += loss.detach()
            add_to_window(run.window, loss, logits, labels)
            run.clock.count(len(batch))
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.samples_in_epoch += recipe.data.global_batch_size

        if progress.step % recipe.run.log_every_steps == 0:
            log_training(run, learning_rate)
            run.damage.gather()
        reason = run.stop.agree(step_loss) if run.damage.fault is None else DAMAGED_DATA
        if reason is not None:
            break
    else:
        reason = run.stop.drain()
    book_time(run)
    if reason is not None and run.stop.drain() == "non-finite loss":
        reason = "non-finite loss"  # graver than a signal: these weights must not be saved
    if reason == "non-finite loss":
        raise RuntimeError(NON_FINITE.format(step=progress.step))
    return reason


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Micro-batches of one step."""
    while group := list(itertools.islice(batches, size)):
        yield group


def sync_gradients(trained: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Gradients are reduced over ranks with the last micro-batch of a step only."""
    if is_last or not isinstance(trained, DistributedDataParallel):
        return contextlib.nullcontext()
    return trained.no_sync()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and the like draw from (seed, step, rank), so a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def add_to_window(
    window: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Add sums on the device; the host looks at them in logging steps only."""
    with torch.no_grad():
        count = len(labels)
        top1, top5 = (count_topk(logits, labels, k) for k in (1, 5))
        window += torch.stack([loss * count, top1, top5, torch.full_like(loss, count)]).double()


def log_training(run: Run, learning_rate: float) -> None:
    """One train row over the steps since the last one, and the live line."""
    loss, top1, top5, count = run.ranks.sum(run.window.tolist())
    run.window.zero_()
    progress, clock = run.progress, run.clock
    row = {
        "step": progress.step,
        "epoch": progress.step / run.steps_per_epoch,
        "split": "train",
        "loss": loss / count,
        "top1": top1 / count,
        "top5": top5 / count,
        "learning_rate": learning_rate,
        "resolution": run.resolution,
        "images_per_second": clock.images_per_second,
        "data_wait_fraction": clock.data_wait_fraction,
        "cost_usd": run.cost_usd,
        "time": time.time(),
    }
    write_row(run, row)
    remaining = (run.schedule.num_steps - progress.step) * clock.seconds
    remaining *= run.recipe.data.global_batch_size / max(clock.images, 1)
    cost = "" if run.cost_usd is None else f"  ${run.cost_usd:.3f}"
    run.console.progress(
        f"epoch {progress.epoch + 1}/{run.recipe.num_epochs}  step {progress.step}/{run.schedule.num_steps}  "
        f"loss {loss / count:.3f}  {clock.images_per_second:,.0f} img/s  "
        f"{duration(remaining)} to go{cost}"
    )


def finish_epoch(run: Run) -> None:
    """Validate, tell the plateau, save."""
    recipe, progress = run.recipe, run.progress
    epoch = progress.epoch + 1
    is_best = False
    result: ValidationResult | None = None
    run.ranks.average_buffers(run.model)
    if epoch == recipe.num_epochs or epoch % recipe.validation.every_epochs == 0:
        result = validate(
            run.model, run.val_loader, run.normalize, run.ranks, recipe.validation_resolution, run.autocast
        )
    run.damage.gather()
    if run.damage.fault is not None:
        end_for_damage(run)  # before the epoch counts: with the data mended, its validation is done again
    progress.epoch = epoch
    progress.samples_in_epoch = 0
    if result is not None:
        run.schedule.end_epoch(result.loss, progress.step)
        progress.final_top1, progress.final_top5 = result.top1, result.top5
        is_best = result.top1 > progress.best_top1
        if is_best:
            progress.best_top1, progress.best_top5 = result.top1, result.top5
            progress.best_epoch = progress.epoch
        log_validation(run, result, is_best)
    save(run, is_best)


def end_for_damage(run: Run) -> NoReturn:
    """Save before ending: what was learnt so far was learnt from intact samples."""
    run.ranks.average_buffers(run.model)
    save(run, is_best=False)
    raise RuntimeError(run.damage.fault)


def log_validation(run: Run, result: ValidationResult, is_best: bool) -> None:
    progress, _clock = run.progress, run.clock
    learning_rate = run.optimizer.param_groups[0]["lr"]
    row = {
        "step": progress.step,
        "epoch": float(progress.epoch),
        "split": "val",
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "learning_rate": learning_rate,
        "resolution": run.recipe.validation_resolution,
        "cost_usd": run.cost_usd,
        "time": time.time(),
    }
    if result.num_damaged:
        row["damaged_samples"] = result.num_damaged
    write_row(run, row)
    speed = progress.train_images / max(progress.train_seconds, 1e-9)
    damaged = f"  {result.num_damaged} damaged, counted as wrong" if result.num_damaged else ""
    cost = "" if run.cost_usd is None else f"  ${run.cost_usd:.3f}"
    run.console.say(
        f"epoch {progress.epoch:3d}/{run.recipe.num_epochs}  val top-1 {result.top1:6.2%}  "
        f"top-5 {result.top5:6.2%}  loss {result.loss:.4f}  lr {learning_rate:.2e}  {speed:,.0f} img/s  "
        f"{duration(run.elapsed_seconds)}{cost}{'  best' if is_best else ''}{damaged}"
    )


def write_row(run: Run, row: dict[str, Any]) -> None:
    """To metrics.jsonl and MLflow; the primary rank only."""
    if not run.ranks.is_primary:
        return
    run.metrics.append(row)
    if run.mlflow is not None:
        split = row["split"]
        named = {
            name: row[name]
            for name in ("epoch", "learning_rate", "images_per_second", "data_wait_fraction", "cost_usd")
            if row.get(name) is not None and (split == "train" or name == "epoch")
        }
        named |= {f"{split}_{name}": row[name] for name in ("loss", "top1", "top5")}
        run.mlflow.log_metrics(named, row["step"])


def book_time(run: Run) -> None:
    """Add the epoch's clock to the run's."""
    run.progress.train_seconds += run.clock.seconds
    run.progress.wait_seconds += run.clock.data_wait_fraction * run.clock.seconds
    run.progress.train_images += run.clock.images


def save(run: Run, is_best: bool) -> None:
    """Write a checkpoint; equal weights on all ranks, so the primary's are everyone's."""
    window = run.ranks.sum(run.window.tolist())

    def write() -> None:
        # A gradient can overflow with the loss still finite; such weights must not replace good ones.
        if not all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()):
            raise RuntimeError(NON_FINITE.format(step=run.progress.step))
        progress = asdict(run.progress) | {"elapsed_seconds": run.elapsed_seconds}
        if run.mlflow is not None:
            progress["mlflow_run_id"] = run.mlflow.run_id
        state = {
            "version": CHECKPOINT_VERSION,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "schedule": run.schedule.state_dict(),
            "progress": progress,
            "window": window,
            "recipe": dump_recipe(run.recipe),
            "data_identity": run.data_identity,
            "class_names": list(run.manifest.class_names),
            "mean": list(run.manifest.mean),
            "std": list(run.manifest.std),
        }
        store = CheckpointStore(run.folder / "checkpoints")
        store.save(state, run.progress.step, is_best, run.recipe.checkpoint.keep_last)

    run.ranks.on_primary(write)


def stop_in_good_order(run: Run, reason: str) -> None:
    """Save in mid-epoch and leave word that this run wants to be started again."""
    run.damage.gather()  # the next start may not meet them again
    run.ranks.average_buffers(run.model)
    save(run, is_best=False)
    if run.ranks.is_primary:
        reason = run.stop.signal_name or reason
        write_status(run.folder, "restart", reason)
        run.console.say(
            f"stopped by {reason} at step {run.progress.step}; the same command goes on from there"
        )
        if run.mlflow is not None:
            run.mlflow.finish("KILLED")


def leave_before_the_start(folder: Path, stop: StopFlag, console: Console) -> None:
    """A signal during staging or the learning-rate finder: there is nothing to save yet."""
    if console.is_enabled:
        write_status(folder, "restart", stop.signal_name or "signal")
        console.say("stopped before the first step; the same command begins again")


def finish_run(run: Run) -> dict[str, Any]:
    """Write `summary.json` and `status.json`, and complete the MLflow run."""
    progress, recipe = run.progress, run.recipe
    manifest = CheckpointStore(run.folder / "checkpoints").manifest()
    best: CheckpointEntry | None = manifest.entry(manifest.best)
    summary: dict[str, Any] = {
        "final_top1": progress.final_top1,
        "final_top5": progress.final_top5,
        "best_top1": progress.best_top1,
        "best_top5": progress.best_top5,
        "best_epoch": progress.best_epoch,
        "validation_resolution": recipe.validation_resolution,
        "epochs": progress.epoch,
        "world_size": run.ranks.world_size,
        "num_parameters": num_parameters(run.model),
        "images_per_second": round(progress.train_images / max(progress.train_seconds, 1e-9), 1),
        "data_wait_fraction": round(progress.wait_seconds / max(progress.train_seconds, 1e-9), 4),
        "wall_seconds": round(run.elapsed_seconds, 1),
        "cost_usd": None if run.cost_usd is None else round(run.cost_usd, 4),
        "mlflow_run_id": run.mlflow.run_id if run.mlflow is not None else None,
        "damaged_samples": run.damage.num_samples,
        "stopped_because": "finished",
        "checkpoint": None if best is None else f"checkpoints/{best.name}",
        "checkpoint_sha256": None if best is None else best.sha256,
    }
    if not run.ranks.is_primary:
        return summary
    path = run.folder / SUMMARY_NAME
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    if run.mlflow is not None:
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        run.mlflow.log_metrics(numbers, progress.step)
        names = ("recipe.yaml", METRICS_NAME, SUMMARY_NAME, "lr_finder.png", "lr_finder.json")
        for artifact in (run.folder / name for name in names):
            if artifact.is_file():
                run.mlflow.log_file(artifact)
        if best is not None:
            run.mlflow.log_file(run.folder / "checkpoints" / "best.pt", "checkpoints")
            run.mlflow.log_file(run.folder / "checkpoints" / "best.safetensors", "checkpoints")
        run.mlflow.finish("FINISHED")
        if run.mlflow.run_id != summary["mlflow_run_id"]:
            summary["mlflow_run_id"] = run.mlflow.run_id
            write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    write_status(run.folder, "finished", f"{progress.epoch} epochs")
    return summary
