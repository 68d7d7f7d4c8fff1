"""The one line that a training prints at its start: is it the data or the model that will be waited for?"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn

from train.config import Recipe
from train.data.batch import Normalize
from train.data.loaders import Loader, build_loader
from train.data.loaders.reference import ReferenceLoader
from train.data.preflight.figures import Figures, Rates
from train.data.preflight.machine import usable_ram_bytes
from train.data.preflight.measure import loader_rate, model_rate, shortened, training_step
from train.data.preflight.verdict import quick_verdict
from train.distributed import Ranks
from train.models.sync_batchnorm import without_sync


def quick_preflight(
    recipe: Recipe,
    ranks: Ranks,
    train_loader: Loader,
    model: nn.Module,
    normalize: Normalize,
    *,
    resolution: int,
    seconds: float = 1.0,
) -> str:
    """Measure loader and model for about `seconds` each, on all ranks at once; a line to print.

    Nothing of the run changes: the steps are those of a copy of the model, which is freed again; the loader
    starts every epoch anew; torch's generators are put back. An error of the machine or the data ends up in
    the line: the training will meet it and say more.

    Args:
        model: not wrapped for DDP; on `ranks.device`, as `normalize` is.
        resolution: of the epoch that is about to begin, in pixels.
    """
    ranks.barrier()  # ranks share the cores: alone, a rank would seem faster than it will be
    device = ranks.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            loader = _loader_alone(train_loader, resolution, seconds)
        except (RuntimeError, ValueError, OSError) as error:
            return f"preflight: the loader was not measured ({_first_line(error)})"
        rate, fault = _model_alone(recipe, ranks, train_loader, model, normalize, resolution, seconds)
    manifest = train_loader.plan.manifest
    figures = Figures(
        num_ranks=ranks.local_world_size,
        num_cores=ranks.num_cores,
        num_workers=train_loader.plan.num_workers,
        shares_cores=device.type == "cpu",
        num_train=train_loader.num_samples,
        num_val=0,
        validate_every_epochs=1,
        data_bytes=manifest.num_bytes,
        training=(Rates(resolution, 1.0, loader, rate),),
        usable_ram_bytes=usable_ram_bytes(),
    )
    return quick_verdict(figures, fault)


def _loader_alone(train_loader: Loader, resolution: int, seconds: float) -> float:
    if not isinstance(train_loader, ReferenceLoader):
        return loader_rate(train_loader, resolution, seconds / 2, num_windows=1)
    # Its worker processes would finish the long batches that they have begun before they start the epoch.
    with contextlib.closing(build_loader("reference", shortened(train_loader.plan))) as loader:
        return loader_rate(loader, resolution, seconds / 2, num_windows=1)


def _model_alone(
    recipe: Recipe,
    ranks: Ranks,
    train_loader: Loader,
    model: nn.Module,
    normalize: Normalize,
    resolution: int,
    seconds: float,
) -> tuple[float | None, str | None]:
    """(images a second or None, why None)."""
    plan, device = train_loader.plan, ranks.device
    try:
        twin = without_sync(copy.deepcopy(model))
        rate = model_rate(
            lambda size: training_step(
                recipe, twin, normalize, plan.manifest.num_classes, resolution, size, device
            ),
            plan.batch_size,
            device,
            seconds,
        )
        return rate, None
    except torch.OutOfMemoryError:
        return None, "there is no memory for a copy of it beside the run's own"
    except Exception as error:  # models raise all kinds, and the training will meet it, too
        return None, _first_line(error)
    finally:
        twin = model  # the copy goes, and its optimizer with the step
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:200]
