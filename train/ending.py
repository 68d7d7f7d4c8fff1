"""How a run ends, or stops: checkpoints, `status.json` and `summary.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from data_prep.storage import write_atomically
from train.checkpoint import CHECKPOINT_VERSION, CheckpointEntry, CheckpointStore
from train.config import dump_recipe
from train.models.build import num_parameters
from train.preemption import StopFlag
from train.reporting import log_validation
from train.run import Run
from train.run_folder import METRICS_NAME, SUMMARY_NAME, write_status
from train.throughput import model_flops_utilization, peak_memory_bytes
from train.tracking.console import Console
from train.tracking.mlflow_run import STOP_SECONDS
from train.validation import ValidationResult

SPOILT = (
    "weights or statistics are non-finite at step {step}: lower optimizer.peak_lr, or use "
    "precision.mode=fp32; the last checkpoint is from before that"
)


def save(run: Run, is_best: bool) -> None:
    """Write a checkpoint; equal weights on all ranks, so the primary's are everyone's."""
    window = run.ranks.sum(run.window.tolist())
    run.progress.skipped_steps = run.skipped_before + int(run.updater.num_skipped)

    def write() -> None:
        weights = run.model.state_dict()
        # Such weights must not replace good ones.
        if not all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point()):
            raise RuntimeError(SPOILT.format(step=run.progress.step))
        progress = asdict(run.progress) | {"elapsed_seconds": run.elapsed_seconds}
        if run.mlflow is not None:
            progress["mlflow_run_id"] = run.mlflow.reference
        state: dict[str, Any] = {
            "version": CHECKPOINT_VERSION,
            "model": weights,
            "headline_weights": run.recipe.headline_weights,
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
        if run.ema is not None:
            state |= {"ema": run.ema.model.state_dict(), "ema_updates": run.ema.num_updates}
        if run.early_stopping is not None:
            state["early_stopping"] = run.early_stopping.state_dict()
        store = CheckpointStore(run.folder / "checkpoints")
        store.save(state, run.progress.step, is_best, run.recipe.checkpoint.keep_last)

    run.ranks.on_primary(write)


def end_for_damage(run: Run) -> NoReturn:
    """Save before ending: what was learnt so far was learnt from intact samples."""
    run.average_buffers()
    save(run, is_best=False)
    raise RuntimeError(run.damage.fault)


def stop_in_good_order(run: Run, reason: str) -> None:
    """Save in mid-epoch and leave word that this run wants to be started again."""
    run.damage.gather()  # the next start may not meet them again
    run.average_buffers()
    save(run, is_best=False)
    if run.ranks.is_primary:
        write_status(run.folder, "restart", reason)
        run.console.say(
            f"stopped by {reason} at step {run.progress.step}; the same command goes on from there"
        )
        if run.mlflow is not None:
            run.mlflow.finish("KILLED", STOP_SECONDS)


def end_by_budget(run: Run, results: dict[str, ValidationResult]) -> dict[str, Any]:
    """End a run whose budget is spent with all its figures; a larger budget goes on from here."""
    is_best = log_validation(run, results)
    save(run, is_best)
    run.console.say(
        f"{run.budget.name} is spent at step {run.progress.step} of {run.num_steps}: raise it and run the "
        "same command to go on from there"
    )
    return finish_run(run, "budget")


def leave_before_the_start(folder: Path, stop: StopFlag, console: Console) -> None:
    """A signal during staging or the learning-rate finder: there is nothing to save yet."""
    if console.is_enabled:
        write_status(folder, "restart", stop.reason or "signal")
        console.say("stopped before the first step; the same command begins again")


def finish_run(run: Run, stopped_because: str) -> dict[str, Any]:
    """Write `summary.json` and `status.json`, and complete the MLflow run.

    Args:
        stopped_because: `finished`, `early stopping` or `budget`.
    """
    progress = run.progress
    manifest = CheckpointStore(run.folder / "checkpoints").manifest()
    best = manifest.entry(manifest.best)
    summary = _summary(run, stopped_because, best)
    if not run.ranks.is_primary:
        return summary
    path = run.folder / SUMMARY_NAME
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    if run.mlflow is not None:
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        for name, figures in summary["views"].items():
            numbers |= {f"final_{name}_{figure}": value for figure, value in figures.items()}
        run.mlflow.log_metrics(numbers, progress.step)
        names = ("recipe.yaml", METRICS_NAME, SUMMARY_NAME, "lr_finder.png", "lr_finder.json")
        for artifact in (run.folder / name for name in names):
            if artifact.is_file():
                run.mlflow.log_file(artifact)
        if best is not None:
            run.mlflow.log_file(run.folder / "checkpoints" / "best.pt", "checkpoints")
            run.mlflow.log_file(run.folder / "checkpoints" / "best.safetensors", "checkpoints")
        for page in sorted((run.folder / "profile").glob("*")):
            run.mlflow.log_file(page, "profile")
        run.mlflow.finish("FINISHED")
        if run.mlflow.run_id != summary["mlflow_run_id"]:
            summary["mlflow_run_id"] = run.mlflow.run_id
            write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    why = f"{progress.epoch} of {run.recipe.num_epochs} epochs"
    why += ", shortened" if progress.num_steps else ""
    why += "" if stopped_because == "finished" else f", {stopped_because}"
    write_status(run.folder, "finished", why)
    return summary


def _summary(run: Run, stopped_because: str, best: CheckpointEntry | None) -> dict[str, Any]:
    progress = run.progress
    speed = progress.train_images / max(progress.train_seconds, 1e-9)
    utilization = model_flops_utilization(speed, run.flops_per_image, run.peak_flops, run.ranks.world_size)
    views = {name: _without_infinite(figures) for name, figures in progress.views.items() if name}
    return {
        "final_top1": progress.final_top1,
        "final_top5": progress.final_top5,
        "best_top1": progress.best_top1,
        "best_top5": progress.best_top5,
        "best_epoch": progress.best_epoch,
        "validation_resolution": run.views[0].resolution,
        "validation": run.views[0].words,
        "views": views,
        "epochs": progress.epoch,
        "planned_epochs": run.recipe.num_epochs,
        "world_size": run.ranks.world_size,
        "num_parameters": num_parameters(run.model),
        "images_per_second": round(speed, 1),
        "data_wait_fraction": round(progress.wait_seconds / max(progress.train_seconds, 1e-9), 4),
        "mfu": None if utilization is None else round(utilization, 4),
        "memory_bytes": peak_memory_bytes(run.ranks.device),
        "wall_seconds": round(run.elapsed_seconds, 1),
        "cost_usd": None if run.cost_usd is None else round(run.cost_usd, 4),
        "mlflow_run_id": run.mlflow.run_id if run.mlflow is not None else None,
        "damaged_samples": run.damage.num_samples,
        "skipped_steps": progress.skipped_steps,
        "stopped_because": stopped_because,
        "checkpoint": None if best is None else f"checkpoints/{best.name}",
        "checkpoint_sha256": None if best is None else best.sha256,
    }


def _without_infinite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
