"""The training loop: data, forward, backward, update, and now and then a look at the validation split.

The one clock is `step`: global batches consumed. Everything that a run needs to go on is in the checkpoint;
learning rate, order, crops and augmentation follow from the step.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.build_run import build_run, set_training_mode, train_part
from train.checkpoint import CheckpointMirror
from train.clip import total_grad_norm
from train.config import Recipe
from train.data.batch import Batch, Targets
from train.data.prefetch import on_device
from train.data.preflight import quick_preflight
from train.data.samples import NothingIntactError
from train.data.staging import staged_folder
from train.distributed import Ranks, StopWanted
from train.ending import (
    end_by_budget,
    end_for_damage,
    finish_run,
    leave_before_the_start,
    stop_in_good_order,
)
from train.preemption import BUDGET, SPOILT, StopFlag, watched
from train.reporting import log_training, log_validation, say_shortening
from train.resuming import resume_or_start
from train.run import Run
from train.sam import perturb, restore, without_running_statistics
from train.saving import close_writer, finish_writing, save
from train.startup import Startup
from train.tracking.console import Console
from train.tracking.mlflow_run import STOP_SECONDS
from train.validation import ValidationResult, count_topks, validate

DAMAGED_DATA = "damaged data"
NON_FINITE = (
    "loss or gradients became non-finite in {limit} steps in a row, up to about step {step}: lower "
    "optimizer.peak_lr, clip gradients (optimizer.clip), or use precision.mode=fp32; the last checkpoint is "
    "from before that"
)


def train(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    startup: Startup | None = None,
    mirror: CheckpointMirror | None = None,
) -> dict[str, Any] | None:
    """Train in `folder` from where it stands; the summary, or None after a planned stop.

    Args:
        startup: marks on the way here, for the line that says where the first seconds went.
        mirror: of this run; on the primary rank.

    Raises:
        ValueError: recipe and data do not go together.
        RuntimeError: the loss became non-finite, or too many samples are damaged.
    """
    began = time.monotonic()  # what is rented costs from here on
    startup = startup or Startup()
    stop = StopFlag(ranks)
    stop.install()  # first of all: what follows takes seconds, and staging perhaps an hour
    console = Console(ranks.is_primary)
    run: Run | None = None
    # What the heartbeat tells the other ranks.
    with watched(recipe.preemption, folder, ranks, stop, lambda: run.progress.step if run else 0):
        data = staged_folder(
            recipe.data.path, recipe.data.stage_folder, ranks, lambda: stop.is_raised, console.say
        )
        if data is None:
            leave_before_the_start(folder, stop, console)
            return None
        startup.mark("data")
        try:
            run = build_run(recipe, folder, data, ranks, stop, console)
        except StopWanted:
            leave_before_the_start(folder, stop, console)
            return None
        run.began, run.startup, run.mirror = began, startup, mirror
        run.startup.mark("model")
        return train_to_the_end(run)


def train_to_the_end(run: Run) -> dict[str, Any] | None:
    """Epoch after epoch, until the last one, a stop or an error; as `train`."""
    try:
        if not resume_or_start(run):
            leave_before_the_start(run.folder, run.stop, run.console)
            if run.mlflow is not None:
                run.mlflow.finish("KILLED", STOP_SECONDS)
            return None
        if run.recipe.run.preflight and run.progress.step == 0:
            say_preflight(run)
        while run.progress.epoch < run.num_epochs and not run.progress.stopped_because:
            reason = train_epoch(run)
            if reason == DAMAGED_DATA:
                end_for_damage(run)
            if reason == "budget" and run.progress.step < run.num_steps:
                if (results := validate_views(run)) is not None:
                    return end_by_budget(run, results)
                reason = run.stop.settle()
            elif reason in (None, "budget"):
                if finish_epoch(run):
                    continue
                reason = run.stop.settle()
            stop_in_good_order(run, reason or "a stop")
            return None
        return finish_run(run, run.progress.stopped_because or "finished")
    except BaseException as error:
        if isinstance(error, NothingIntactError) and run.ranks.world_size == 1:
            # With several ranks the others are in the middle of a step: there the last checkpoint stands.
            run.damage.gather()
            save(run, is_best=False)
        if not isinstance(error, KeyboardInterrupt):  # a second Ctrl-C: at once
            close_writer(run)
        if run.mlflow is not None:
            run.mlflow.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", STOP_SECONDS)
        raise
    finally:
        if said := run.profiler.close():
            run.console.say(said)
        if run.tensorboard is not None:
            run.tensorboard.close()
        for loader in (run.train_loader, *run.val_loaders.values()):
            loader.close()


def say_preflight(run: Run) -> None:
    """Measure on copies, for two seconds, whether data or model will be the limit."""
    line = quick_preflight(
        run.recipe, run.ranks, run.train_loader, run.model, run.normalize, resolution=run.resolution
    )
    run.console.say(f"  {line}")


def train_epoch(run: Run) -> str | None:
    """The rest of the current epoch; the reason to stop, or None at its end."""
    progress = run.progress
    set_training_mode(run)
    _ = run.flops_per_image  # counted before the clock runs
    run.clock.reset()
    epoch = run.train_loader.epoch(progress.epoch, progress.samples_in_epoch, resolution=run.resolution)
    batches = run.profiler.waiting(run.clock.waiting(on_device(epoch, run.ranks.device)))
    steps = grouped(batches, run.recipe.data.accum_steps)
    for micro_batches in itertools.islice(steps, run.num_steps - progress.step):
        train_step(run, micro_batches)
        if progress.step % run.recipe.run.log_every_steps == 0:
            with run.profiler.part("log"):
                log_training(run)
                run.damage.gather()
        if run.ranks.is_primary:
            ask_of_others(run)
        agreed = run.stop.agree(run.updater.gave_up)
        reason = DAMAGED_DATA if run.damage.fault is not None else agreed.reason
        if reason is not None:
            break
        if agreed.save or run.cadence.is_step(progress.step):
            save(run, is_best=False)
    else:
        reason = run.stop.drain()
    book_time(run)
    if reason is not None and run.stop.drain() == "non-finite loss":
        reason = "non-finite loss"  # graver than a signal: there is nothing to gain from going on
    if reason == "spoilt weights":
        finish_writing(run, 0)  # says which, on all ranks
    if reason == "non-finite loss":
        limit = run.recipe.optimizer.max_skipped_steps + 1
        raise RuntimeError(NON_FINITE.format(step=progress.step, limit=limit))
    return reason


def ask_of_others(run: Run) -> None:
    """What the primary's clock and threads want of all ranks; they agree on it two steps later."""
    assert run.writer is not None
    if run.writer.fault is not None:
        run.stop.raise_for(SPOILT)
    if run.budget.is_spent(run.elapsed_seconds):
        run.stop.raise_for(BUDGET)
    if run.cadence.is_due():
        run.cadence.restart()
        run.stop.ask_for_save()


def train_step(run: Run, micro_batches: list[Batch]) -> None:
    """One global batch: gradients of all micro-batches, one update."""
    progress, part = run.progress, run.profiler.part
    if run.num_done == 0:
        run.startup.mark("first batch")
    begin_phase(run)
    run.learning_rate = run.schedule.begin_step(run.optimizer, progress.step)
    run.updater.begin()
    loss = compute_gradients(run, micro_batches, run.window)
    sam = run.recipe.optimizer.sam
    if sam is not None and progress.step % sam.every_steps == 0:
        gradients_from_uphill(run, micro_batches, sam.rho)
    with part("update"):
        run.updater.end(loss)
        if run.ema is not None:
            run.ema.update(progress.step + 1)
    progress.step += 1
    progress.samples_in_epoch += run.recipe.data.global_batch_size
    run.num_done += 1
    if run.num_done == 1:
        say_startup(run)
    if said := run.profiler.step(run.num_done):
        run.console.say(said)


def say_startup(run: Run) -> None:
    """Where the time went until the first step was done."""
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()  # once a start
    run.startup.mark("first step")
    run.console.say(f"  first step {run.startup.describe()}")


def compute_gradients(
    run: Run, micro_batches: list[Batch], window: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the gradients of a step's micro-batches; their mean loss, 0-dimensional on the device."""
    part, step = run.profiler.part, run.progress.step
    mean_loss = torch.zeros((), device=run.ranks.device)
    seed_step(run.recipe.run.seed, step, run.ranks.rank)
    for position, batch in enumerate(micro_batches):
        pixels, targets = batch.images, Targets(batch.labels)
        if not run.augment.is_identity:
            with part("augment"):
                seed = micro_seed(run.recipe.run.seed, step, run.ranks.rank, position)
                pixels, targets = run.augment(pixels, batch.labels, seed)
        with sync_gradients(run.trained, position == len(micro_batches) - 1):
            with part("forward"), run.autocast:
                output = run.trained(run.normalize(pixels))
                teacher_logits = None if run.teacher is None else run.teacher.logits(pixels)
            with part("forward"):
                loss, logits = run.loss(output, targets, teacher_logits)
            with part("backward"):
                run.scaler.scale(loss / len(micro_batches)).backward()
        mean_loss += loss.detach() / len(micro_batches)
        if window is not None:
            add_to_window(window, loss.detach(), logits.detach(), batch.labels)
            run.clock.count(len(batch))
    return mean_loss


def gradients_from_uphill(run: Run, micro_batches: list[Batch], rho: float) -> None:
    """Sharpness-aware minimization: the gradients of a point `rho` uphill take the place of those here."""
    parameters = list(run.model.parameters())
    saved = perturb(parameters, rho, total_grad_norm(parameters))
    run.optimizer.zero_grad(set_to_none=True)
    with without_running_statistics(run.model):
        compute_gradients(run, micro_batches)
    restore(parameters, saved)


def begin_phase(run: Run) -> None:
    """Freeze or unfreeze where a new phase of the schedule wants it."""
    trainable = run.schedule.trainable_at(run.progress.step)
    if trainable != run.trainable:
        train_part(run, trainable)


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
    """Dropout and the like draw from (seed, step, rank), so a resumed run draws the same.

    By generator: `torch.manual_seed` looks for every kind of device, a hundred times as long.
    """
    number = (seed * 1_000_003 + step) * 4_099 + rank
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


def micro_seed(seed: int, step: int, rank: int, position: int) -> int:
    """Seed of a micro-batch's augmentation: other draws for each, the same again after a restart."""
    return ((seed * 1_000_003 + step) * 4_099 + rank) * 1_031 + position


def add_to_window(
    window: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Add sums on the device; the host looks at them in logging steps only."""
    count = len(labels)
    top1, top5 = count_topks(logits, labels, (1, 5))
    window += torch.stack([loss * count, top1, top5, torch.full_like(loss, count)])


def finish_epoch(run: Run) -> bool:
    """Validate, tell plateau and early stopping, save, look at the budget; False where a stop came first."""
    recipe, progress = run.recipe, run.progress
    epoch = progress.epoch + 1
    results: dict[str, ValidationResult] | None = {}
    if epoch == run.num_epochs or epoch % recipe.validation.every_epochs == 0:
        results = validate_views(run)
    if results is None:
        return False  # the epoch does not count yet: the next start validates
    run.damage.gather()
    if run.damage.fault is not None:
        end_for_damage(run)  # before the epoch counts: with the data mended, its validation is done again
    progress.epoch = epoch
    progress.samples_in_epoch = 0
    is_best = False
    if results:
        headline = results[""]
        run.schedule.end_epoch(headline.loss, progress.step)
        if run.early_stopping is not None and run.early_stopping.update(headline.top1, headline.loss):
            progress.stopped_because = "early stopping"
        is_best = log_validation(run, results)
    shorten_to_budget(run)
    save(run, is_best)
    return True


def validate_views(run: Run) -> dict[str, ValidationResult] | None:
    """Every view of the validation split, by name; None where somebody asked the run to stop meanwhile."""
    began = time.monotonic()
    run.average_buffers()
    results = {}
    for view in run.views:
        result = validate(
            run.ema.model if run.ema is not None and view.weights == "ema" else run.model,
            run.val_loaders[view.crop_ratio],
            run.normalize,
            run.ranks,
            view.resolution,
            run.autocast,
            view.flip_average,
            lambda: run.stop.settle() not in (None, "budget"),
        )
        if result is None:
            return None
        results[view.name] = result
    run.progress.validation_seconds += time.monotonic() - began
    run.clock.reset()
    return results


def shorten_to_budget(run: Run) -> None:
    """Where the budget does not hold the epochs to come: fewer steps, and the schedule ends with them."""
    progress = run.progress
    if not run.recipe.budget.shorten or progress.step >= run.num_steps:
        return
    # The primary's clock decides.
    num_steps = run.ranks.broadcast(steps_in_budget(run))
    if num_steps >= run.num_steps:
        return
    if num_steps == progress.step:
        progress.stopped_because = "budget"
        return
    progress.num_steps = num_steps
    progress.shortened_for_seconds = run.budget.seconds
    run.schedule.shorten(progress.step, num_steps)
    say_shortening(run)


def steps_in_budget(run: Run) -> int:
    """Steps of the whole run that the budget holds: whole epochs, or a part of one where none fits."""
    progress, left = run.progress, run.budget.seconds_left(run.elapsed_seconds)
    if run.remaining_seconds <= left:
        return run.num_steps
    now = run.schedule.virtual_step(progress.step) / run.steps_per_epoch
    for epochs in range(run.num_epochs - progress.epoch - 1, 0, -1):
        # The rest of the recipe's epochs, passed through faster: large images come sooner, too.
        pace = (run.recipe.num_epochs - now) / epochs
        areas = [run.recipe.data.resolution_at(int(now + pace * epoch)) ** 2 for epoch in range(epochs)]
        if sum(areas) * run.seconds_per_area <= left:
            return progress.step + epochs * run.steps_per_epoch
    validation = progress.validation_seconds / progress.epoch
    epoch_seconds = run.seconds_per_area * run.recipe.data.resolution_at(run.recipe.num_epochs) ** 2
    share = max(0.0, left - validation) / max(epoch_seconds - validation, 1e-9)
    return progress.step + int(min(share, 1.0) * run.steps_per_epoch)


def book_time(run: Run) -> None:
    """Add the epoch's clock to the run's."""
    seconds = run.clock.seconds
    run.progress.train_seconds += seconds
    run.progress.wait_seconds += run.clock.data_wait_fraction * seconds
    run.progress.train_images += run.clock.images
    run.clock.reset()
