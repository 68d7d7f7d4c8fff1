"""Taking a run up where its newest whole checkpoint left it, or beginning it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.storage import sha256_file
from train.checkpoint import (
    CheckpointEntry,
    CheckpointManifest,
    CheckpointStore,
    CheckpointWriter,
    load_checkpoint,
)
from train.config import flatten, parse_recipe
from train.data.batch import Targets
from train.data.folds import fold_identity
from train.distributed import Ranks, describe_hardware
from train.fork import origin_of
from train.optim import set_peak_lr
from train.preemption import TAKEN_OVER
from train.run import Progress, Run
from train.run_folder import METRICS_NAME
from train.saving import load_rank_state
from train.tracking.metrics_file import read_metrics
from train.tracking.mlflow_run import MlflowRun
from train.tracking.tensorboard import TensorBoardWriter


def resume_or_start(run: Run) -> bool:
    """Go on from the newest whole checkpoint, or find a learning rate and begin; False on a signal."""
    store = CheckpointStore(run.folder / "checkpoints")
    latest = run.latest
    state: dict[str, Any] | None = None
    if latest is not None:
        state = _read_state(store.folder, latest, run.ranks)
        load_state(run, state)
    run.startup.mark("checkpoint")
    if run.ranks.is_primary:
        run.metrics.cut_to(0 if state is None else state["num_metrics_rows"])
        if state is None:
            run.damage.start_over()
        run.writer = CheckpointWriter(
            store, run.recipe.checkpoint.keep_last, run.console.say, run.metrics.sync, _announced(run)
        )
        if run.recipe.tracking.tensorboard:
            rows = read_metrics(path) if (path := run.folder / METRICS_NAME).is_file() else []
            run.tensorboard = TensorBoardWriter(run.folder, rows, run.progress.step, run.console.say)
        if run.recipe.tracking.mlflow:
            run.mlflow = MlflowRun(
                run.recipe.tracking, run.folder, run.progress.mlflow_run_id, run.console.say
            )
            run.mlflow.log_parameters(flatten(run.recipe.model_dump(mode="json")))
            run.mlflow.set_tags(_tags(run))
    if latest is not None:
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        again = f" (restart {restarts} by torchrun)" if restarts else ""
        run.console.say(
            f"going on from {latest.name}: epoch {run.progress.epoch + 1}, step {run.progress.step}{again}"
        )
    elif run.recipe.lr_finder.enabled:
        return run_lr_finder(run)
    return True


def _read_state(folder: Path, entry: CheckpointEntry, ranks: Ranks) -> dict[str, Any]:
    """The checkpoint that the primary rank checked; sent to machines that do not see its disk."""
    path = folder / entry.name
    host = ranks.broadcast(socket.gethostname())
    is_here = path.is_file()
    if is_here and host != socket.gethostname():
        is_here = sha256_file(path) == entry.sha256  # not another run's of the same name
    if all(ranks.gather(is_here)):
        return load_checkpoint(path, check_sha256=False)
    content = ranks.broadcast_bytes(path.read_bytes() if ranks.is_primary else b"")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(content)
        file.flush()
        return load_checkpoint(Path(file.name), check_sha256=False)


def _announced(run: Run) -> Callable[[CheckpointManifest], None]:
    """What is to be done when a checkpoint is on the disk; called in the writer's thread."""
    mirror = run.mirror
    if mirror is None:
        return lambda manifest: None
    mirror.on_taken_over = lambda: run.stop.raise_for(TAKEN_OVER)
    mirror.claim()
    return lambda manifest: mirror.submit(run.folder, manifest)


def load_state(run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint into the parts of a run.

    Raises:
        ValueError: it was made with other classes, other data or another fold, or by an earlier version.
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
    if (then := _fold_of(state)) != run.fold_identity:
        raise ValueError(
            f"the checkpoint in {run.folder} was trained {_words_of(then)}, and this recipe trains "
            f"{_words_of(run.fold_identity)}, so it would not hold out the same images: keep "
            "data.folds, data.fold and data.fold_seed, or begin a run of its own (run.name)"
        )
    if "rank_states" not in state or "learning_rate" not in state:
        raise ValueError(
            f"the checkpoint in {run.folder} was written by an earlier version and cannot be gone on with: "
            "choose another run.name, and begin with its weights (model.checkpoint)"
        )
    try:
        _load_parts(run, state)
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"the checkpoint in {run.folder} does not fit this recipe ({reason}): model, optimizer and "
            "average must be the same"
        ) from None


def _fold_of(state: dict[str, Any]) -> list[int] | None:
    """[folds, fold, fold_seed] of a checkpoint; those of earlier versions only have it in their recipe."""
    if "fold" in state:
        fold = state["fold"]
        return fold if isinstance(fold, list) and len(fold) == 3 else None
    try:
        return fold_identity(parse_recipe(state["recipe"]).data)
    except (KeyError, ValueError):
        return None


def _words_of(fold: list[int] | None) -> str:
    if fold is None:
        return "on the whole train split"
    return f"without fold {fold[1]} of {fold[0]} (fold_seed {fold[2]})"


def _load_parts(run: Run, state: dict[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.schedule.load_state_dict(state["schedule"], run.optimizer)
    run.updater.load_state_dict(state["updater"])
    run.learning_rate = state["learning_rate"]
    # A fork may have what the run before had not; it begins then.
    if run.ema is not None and "ema" in state:
        run.ema.model.load_state_dict(state["ema"])
        run.ema.num_updates = state["ema_updates"]
    if run.early_stopping is not None and "early_stopping" in state:
        run.early_stopping.load_state_dict(state["early_stopping"])
    known = {field.name for field in fields(Progress)}
    run.progress = Progress(**{name: value for name, value in state["progress"].items() if name in known})
    run.progress.skipped_steps = int(run.updater.num_skipped)
    # Checkpoints of earlier versions do not say, but theirs always got what they asked for.
    run.progress.weights_at_start = run.progress.weights_at_start or run.recipe.weights_at_start
    if origin_of(run.folder).get("step") == run.progress.step:
        run.progress.best_top1, run.progress.mlflow_run_id = -1.0, None
        run.progress.stopped_because = ""
    load_rank_state(run, state["rank_states"])
    if run.progress.stopped_because == "budget" and not run.budget.is_spent(run.elapsed_seconds):
        run.progress.stopped_because = ""
    if run.progress.num_steps and run.budget.seconds > run.progress.shortened_for_seconds:
        run.progress.num_steps = 0  # a larger budget: what it holds is looked at again
        run.schedule.restore_length()


def run_lr_finder(run: Run) -> bool:
    """Look for a learning rate, save curve and choice, and train with it where the recipe says so.

    Returns:
        False where a signal ended the search: nothing was trained, a new start begins again.
    """
    from train.lr_finder import find_learning_rate, save_result

    recipe = run.recipe
    result = find_learning_rate(
        nn.Sequential(run.normalize, run.trained),
        run.optimizer,
        lambda output, labels: run.loss(output, Targets(labels))[0],
        run.train_loader,
        recipe.lr_finder,
        resolution=recipe.data.resolution_at(0),
        grad_accum_steps=recipe.data.accum_steps,
        precision=run.precision,
        ranks=run.ranks,
        wants_to_stop=lambda: run.stop.is_raised,
        clip=None if recipe.optimizer.clip is None else run.updater.clip,
    )
    if result is None:
        return False
    use = recipe.lr_finder.use and result.choice is not None
    if use and result.choice is not None:
        run.schedule.peak_lr = result.choice
        set_peak_lr(run.optimizer, result.choice)
    if run.ranks.is_primary:
        save_result(result, run.folder, run.schedule.peak_lr)
        found = "no choice" if result.choice is None else f"{result.choice:.3g}"
        run.console.say(
            f"learning-rate finder: {found} ({result.reason}); confidence {result.confidence}: "
            f"{result.confidence_reason}\n  training with peak_lr {run.schedule.peak_lr:.3g}"
            + ("" if use else " of the recipe")
        )
        if run.mlflow is not None:
            run.mlflow.log_metrics({"peak_lr": run.schedule.peak_lr}, 0)
            for name in ("lr_finder.png", "lr_finder.json"):
                run.mlflow.log_file(run.folder / name)
    return True


def _tags(run: Run) -> dict[str, str]:
    origin = origin_of(run.folder)
    return {
        "dataset": run.recipe.data.name,
        "hardware": describe_hardware(run.ranks),
        "run_folder": str(run.folder.resolve()),
        "weights_at_start": run.progress.weights_at_start,
        "weights_note": run.progress.weights_note,
        "price": run.price.source if run.price else "",
        **({"forked_from": f"{origin['from']} at step {origin['step']}"} if origin else {}),
    }
