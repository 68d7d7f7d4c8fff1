"""What a run says while it goes on: rows of metrics, the live line, and a line an epoch."""

from __future__ import annotations

import math
import time
from typing import Any

from train.run import Run
from train.throughput import model_flops_utilization, peak_memory_bytes
from train.tracking.console import duration
from train.tracking.metrics_file import clean_row
from train.validation import ValidationResult


def log_training(run: Run) -> None:
    """One train row over the steps since the last one, and the live line."""
    loss, top1, top5, count = run.ranks.sum(run.window.tolist())
    run.window.zero_()
    progress, clock = run.progress, run.clock
    speed = clock.images_per_second
    progress.skipped_steps = int(run.updater.num_skipped)
    num_spikes = int(run.updater.spikes.num_spikes)
    utilization = model_flops_utilization(speed, run.flops_per_image, run.peak_flops, run.ranks.world_size)
    estimate = run.estimated_cost_usd
    row = {
        "step": progress.step,
        "epoch": progress.step / run.steps_per_epoch,
        "split": "train",
        "loss": loss / count,
        "top1": top1 / count,
        "top5": top5 / count,
        "learning_rate": run.learning_rate,
        "resolution": run.resolution,
        "grad_norm": float(run.updater.grad_norm),
        "skipped_steps": progress.skipped_steps or None,
        "loss_spikes": num_spikes or None,
        "loss_scale": run.scaler.get_scale() if run.scaler.is_enabled() else None,
        "images_per_second": speed,
        "data_wait_fraction": clock.data_wait_fraction,
        "mfu": utilization,
        "memory_bytes": peak_memory_bytes(run.ranks.device),
        "cost_usd": run.cost_usd,
        "epoch_cost_usd": run.epoch_cost_usd,
        "estimated_cost_usd": estimate,
        "time": time.time(),
    }
    write_row(run, row)
    skipped = f"  {progress.skipped_steps} steps skipped" if progress.skipped_steps else ""
    skipped += f"  {num_spikes} loss spikes" if num_spikes else ""
    cost = "" if run.cost_usd is None else f"  ${run.cost_usd:.3f} of ~${estimate:.3f}"
    to_go = duration(run.remaining_seconds)
    run.console.progress(
        f"epoch {progress.epoch + 1}/{run.num_epochs}  step {progress.step}/{run.num_steps}  "
        f"loss {loss / count:.3f}  {speed:,.0f} img/s  {to_go} to go{cost}{skipped}",
        progress.step / run.num_steps,
    )


def log_validation(run: Run, results: dict[str, ValidationResult]) -> bool:
    """Rows of all views, the epoch's line, the run's figures; whether the headline is the best so far."""
    progress, result = run.progress, results[""]
    is_best = result.top1 > progress.best_top1
    progress.final_top1, progress.final_top5 = result.top1, result.top5
    if is_best:
        progress.best_top1, progress.best_top5 = result.top1, result.top5
        progress.best_epoch = progress.epoch
    progress.views = {
        name: {"top1": other.top1, "top5": other.top5, "loss": other.loss} for name, other in results.items()
    }
    for view in run.views:
        write_row(run, _validation_row(run, view.name, view.resolution, results[view.name]))
    speed = progress.train_images / max(progress.train_seconds, 1e-9)
    others = "".join(f"  {view.name} {results[view.name].top1:.2%}" for view in run.views if view.name)
    damaged = f"  {result.num_damaged} damaged, counted as wrong" if result.num_damaged else ""
    skipped = f"  {progress.skipped_steps} steps skipped" if progress.skipped_steps else ""
    cost = "" if run.cost_usd is None else f"  ${run.cost_usd:.3f} (${run.epoch_cost_usd:.3f} an epoch)"
    if run.cost_usd is not None and progress.epoch < run.num_epochs:
        cost += f" of ~${run.estimated_cost_usd:.3f}"
    epoch = math.ceil(progress.step / run.steps_per_epoch)
    run.console.say(
        f"epoch {epoch:3d}/{run.num_epochs}  val top-1 {result.top1:6.2%}  "
        f"top-5 {result.top5:6.2%}{others}  loss {result.loss:.4f}  lr {run.learning_rate:.2e}  "
        f"{speed:,.0f} img/s  {duration(run.elapsed_seconds)}{cost}{'  best' if is_best else ''}"
        f"{damaged}{skipped}"
    )
    return is_best


def _validation_row(run: Run, view: str, resolution: int, result: ValidationResult) -> dict[str, Any]:
    progress = run.progress
    return {
        "step": progress.step,
        "epoch": progress.step / run.steps_per_epoch,
        # Only the headline's rows are of the split "val": nobody shall take another view's for it.
        "split": f"val:{view}" if view else "val",
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "learning_rate": run.learning_rate,
        "resolution": resolution,
        "cost_usd": run.cost_usd,
        "damaged_samples": result.num_damaged or None,
        "time": time.time(),
    }


def say_shortening(run: Run) -> None:
    run.console.say(
        f"{run.budget.name} does not hold {run.recipe.num_epochs} epochs: the run ends after "
        f"{run.num_steps / run.steps_per_epoch:.4g}, and the schedule with it"
    )


def write_row(run: Run, row: dict[str, Any]) -> None:
    """To metrics.jsonl, TensorBoard and MLflow; the primary rank only."""
    if not run.ranks.is_primary:
        return
    run.metrics.append(row)
    if run.tensorboard is not None:
        run.tensorboard.add(clean_row(row))
    if run.mlflow is not None:
        run.mlflow.poke()
