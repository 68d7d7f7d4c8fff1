"""How a run ends, or stops: checkpoints, `status.json` and `summary.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from data_prep.storage import write_atomically
from train.checkpoint import CheckpointEntry, CheckpointStore
from train.models.build import num_parameters
from train.preemption import REASONS, SPOT, TAKEN_OVER, StopFlag
from train.reporting import log_validation
from train.run import Run
from train.run_folder import METRICS_NAME, SUMMARY_NAME, write_status
from train.saving import END_SECONDS, MIRROR_SECONDS, SIGNAL_SECONDS, SPOT_SECONDS, finish_writing, save
from train.throughput import model_flops_utilization, peak_memory_bytes
from train.tracking.console import Console
from train.tracking.mlflow_run import STOP_SECONDS
from train.validation import ValidationResult


def end_for_damage(run: Run) -> NoReturn:
    """Save before ending: what was learnt so far was learnt from intact samples."""
    save(run, is_best=False)
    finish_writing(run, SIGNAL_SECONDS)
    raise RuntimeError(run.damage.fault)


def stop_in_good_order(run: Run, reason: str) -> None:
    """Save in mid-epoch and leave word that this run wants to be started again.

    Raises:
        ValueError: the checkpoint could not be written in time; the one before it stands.
    """
    run.damage.gather()  # the next start may not meet them again
    save(run, is_best=False)
    is_spot = reason == REASONS[SPOT]
    try:
        finish_writing(run, SPOT_SECONDS if is_spot else SIGNAL_SECONDS)
    except ValueError as error:
        if run.ranks.is_primary:
            write_status(run.folder, "restart", f"{reason}; {error}")
        raise
    if not run.ranks.is_primary:
        return
    if reason == REASONS[TAKEN_OVER]:
        # Started again, it would take the run back, and so on for ever.
        words = "another machine goes on with this run: its mirror was taken over"
        write_status(run.folder, "failed", words)
        run.console.say(f"stopped at step {run.progress.step}: {words}; start nothing here")
    else:
        write_status(run.folder, "restart", reason)
        run.console.say(
            f"stopped by {reason} at step {run.progress.step}; the same command goes on from there"
        )
    finish_mirroring(run, SPOT_SECONDS if is_spot else MIRROR_SECONDS)
    if run.mlflow is not None:
        run.mlflow.finish("KILLED", STOP_SECONDS)


def finish_mirroring(run: Run, timeout_seconds: float) -> None:
    """Wait for what is under way to S3, and say how it stands; the primary rank only."""
    mirror = run.mirror
    if mirror is None or mirror.taken_over:
        return
    if mirror.wait(timeout_seconds):
        run.console.say(f"all of it is in {mirror.location}")
    else:
        why = mirror.trouble or "too slow"
        run.console.say(
            f"warning: the last checkpoint is not in {mirror.location} yet ({why}); it is in {run.folder}, "
            "and is mirrored when the run goes on here"
        )
    mirror.close()


def end_by_budget(run: Run, results: dict[str, ValidationResult]) -> dict[str, Any]:
    """End a run whose budget is spent with all its figures; a larger budget goes on from here."""
    is_best = log_validation(run, results)
    save(run, is_best)
    finish_writing(run, END_SECONDS)
    run.console.say(
        f"{run.budget.name} is spent at step {run.progress.step} of {run.num_steps}: raise it and run the "
        "same command to go on from there"
    )
    return finish_run(run, "budget")


def leave_before_the_start(folder: Path, stop: StopFlag, console: Console) -> None:
    """A signal during staging, a download or the learning-rate finder: there is nothing to save yet."""
    if console.is_enabled:
        write_status(folder, "restart", stop.reason or "signal")
        console.say("stopped before the first step; the same command begins again")


def finish_run(run: Run, stopped_because: str) -> dict[str, Any]:
    """Write `summary.json` and `status.json`, and complete the MLflow run.

    Args:
        stopped_because: `finished`, `early stopping` or `budget`.
    """
    progress = run.progress
    progress.skipped_steps = int(run.updater.num_skipped)
    finish_writing(run, END_SECONDS)
    manifest = CheckpointStore(run.folder / "checkpoints").manifest()
    best = manifest.entry(manifest.best)
    summary = _summary(run, stopped_because, best)
    if not run.ranks.is_primary:
        return summary
    path = run.folder / SUMMARY_NAME
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    why = f"{progress.epoch} of {run.recipe.num_epochs} epochs"
    why += ", shortened" if progress.num_steps else ""
    why += "" if stopped_because == "finished" else f", {stopped_because}"
    write_status(run.folder, "finished", why)  # what follows may take minutes, and need not succeed
    finish_mirroring(run, END_SECONDS)
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
        "weights_at_start": progress.weights_at_start,
        "weights_note": progress.weights_note,
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
