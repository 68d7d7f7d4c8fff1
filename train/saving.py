"""What goes into a checkpoint: everything that a run needs to go on as if nothing had happened."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from train.checkpoint import CHECKPOINT_VERSION
from train.config import dump_recipe
from train.run import Run

SPOT_SECONDS, SIGNAL_SECONDS = 45.0, 12.0  # a spot notice leaves two minutes, torchrun half a one
MIRROR_SECONDS = 8.0  # more of that half minute, for S3
ERROR_SECONDS = 5.0
END_SECONDS = 120.0  # for a disk that was full at the end to become free


def save(run: Run, is_best: bool) -> None:
    """Have a checkpoint of this very step written, in the background; called by all ranks.

    Weights are equal on all ranks, so the primary's are everyone's. What differs (BatchNorm statistics, sums
    for the next row of metrics) is gathered, and stays as it is: a save changes nothing of the training.
    """
    rank_states = _gather_rank_states(run)
    if not run.ranks.is_primary:
        return
    assert run.writer is not None and rank_states is not None
    run.writer.submit(_state(run, rank_states), run.progress.step, is_best)
    run.cadence.restart()


def _state(run: Run, rank_states: torch.Tensor) -> dict[str, Any]:
    progress = asdict(run.progress) | {"elapsed_seconds": run.elapsed_seconds}
    del progress["skipped_steps"]  # the updater's state has it; the host would wait for the device here
    if run.mlflow is not None:
        progress["mlflow_run_id"] = run.mlflow.reference
    mean = rank_states.mean(0)
    state: dict[str, Any] = {
        "version": CHECKPOINT_VERSION,
        "model": _with_statistics(run.model, mean),
        "headline_weights": run.recipe.headline_weights,
        "optimizer": run.optimizer.state_dict(),
        "updater": run.updater.state_dict(),
        "scaler": run.scaler.state_dict(),
        "schedule": run.schedule.state_dict(),
        "progress": progress,
        "rank_states": rank_states,
        "learning_rate": run.learning_rate,  # for the row of a validation that comes before the next step
        "num_metrics_rows": run.metrics.num_rows,
        "recipe": dump_recipe(run.recipe),
        "data_identity": run.data_identity,
        "fold": run.fold_identity,
        "class_names": list(run.manifest.class_names),
        # For whoever uses the model where the data set is not.
        "display_names": list(run.manifest.display_names),
        "image_settings": run.manifest.images.model_dump(mode="json"),
        "mean": list(run.manifest.mean),
        "std": list(run.manifest.std),
    }
    if run.ema is not None:
        start = sum(buffer.numel() for buffer in _statistics(run.model))
        state |= {
            "ema": _with_statistics(run.ema.model, mean[start:]),
            "ema_updates": run.ema.num_updates,
        }
    if run.early_stopping is not None:
        state["early_stopping"] = run.early_stopping.state_dict()
    return state


def _statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    """What each rank has of its own in a model: the running statistics of its norms."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _with_statistics(model: torch.nn.Module, mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's state with the mean of all ranks' statistics, as a validation would have it."""
    state = model.state_dict()
    names = {buffer.data_ptr(): name for name, buffer in state.items()}
    position = 0
    for buffer in _statistics(model):
        values = mean[position : position + buffer.numel()]
        position += buffer.numel()
        if buffer.data_ptr() in names:  # else it is not part of the state
            state[names[buffer.data_ptr()]] = values.view(buffer.shape).to(buffer.dtype)
    return state


def rank_state(run: Run) -> torch.Tensor:
    """What is this rank's own: statistics of its models, sums for the next row. Float64, shape (values,)."""
    models = [run.model] if run.ema is None else [run.model, run.ema.model]
    buffers = [buffer for model in models for buffer in _statistics(model)]
    return torch.cat([*(buffer.detach().reshape(-1).double() for buffer in buffers), run.window])


def _gather_rank_states(run: Run) -> torch.Tensor | None:
    """The states of all ranks on the primary: shape (world_size, values)."""
    own, ranks = rank_state(run), run.ranks
    if ranks.world_size == 1:
        return own[None]
    if not ranks.is_primary:
        dist.gather(own, dst=0)
        return None
    states = [torch.empty_like(own) for _ in range(ranks.world_size)]
    dist.gather(own, states, dst=0)
    return torch.stack(states)


def load_rank_state(run: Run, states: torch.Tensor) -> None:
    """Take up this rank's own part; on another number of ranks the primary takes the sums.

    Args:
        states: as saved, shape (world_size then, values).
    """
    ranks, own = run.ranks, rank_state(run)
    num_sums = run.window.numel()
    # A fork may have an average of the weights that the run before had not.
    if len(states) != ranks.world_size or states.shape[1] != own.numel():
        sums = states[:, -num_sums:].sum(0)
        if ranks.is_primary:
            run.window += sums.to(run.window)
        return  # the model's state has the mean of the statistics
    values = states[ranks.rank].to(own)
    run.window += values[-num_sums:]
    models = [run.model] if run.ema is None else [run.model, run.ema.model]
    position = 0
    with torch.no_grad():
        for buffer in (buffer for model in models for buffer in _statistics(model)):
            buffer.copy_(values[position : position + buffer.numel()].view(buffer.shape))
            position += buffer.numel()


def finish_writing(run: Run, timeout_seconds: float) -> None:
    """Wait for the last checkpoint; called by all ranks, and an error on all of them.

    Raises:
        ValueError: it could not be written, as a sentence.
    """

    def wait() -> None:
        assert run.writer is not None
        run.writer.finish(timeout_seconds)

    run.ranks.on_primary(wait)


def close_writer(run: Run) -> None:
    """On the way out after an error: let the last checkpoint that is under way get to the disk."""
    if run.writer is not None:
        with contextlib.suppress(RuntimeError):
            run.writer.finish(SIGNAL_SECONDS)
        run.writer.close()
    if run.mirror is not None:
        run.mirror.wait(ERROR_SECONDS)
        run.mirror.close()
