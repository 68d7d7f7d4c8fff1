"""The largest micro-batch that fits into memory, for `data.grad_accum_steps: auto`.

Found once by a real forward and backward pass at the recipe's largest resolution, and kept in the run's
folder: a restart uses the same, so that sums and BatchNorm statistics stay those of the run.

On a GPU "fits" means that no allocation failed and that the optimizer's state still finds room. On a CPU,
where too much memory ends the process, it is computed: a pass of two and of four images tells what an image
holds between forward and backward. A teacher is loaded before, so its weights are not free any more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data_prep.plain_json import read_json
from data_prep.storage import write_atomically
from train.config import Recipe
from train.data.batch import Normalize
from train.data.preflight.machine import usable_ram_bytes
from train.data.preflight.measure import training_step
from train.distributed import Ranks
from train.models.sync_batchnorm import without_sync
from train.run_folder import MICRO_BATCH_NAME

USABLE_FRACTION = 0.85  # of free memory: allocators fragment, loaders and checkpoints want some, too


def resolve_grad_accum_steps(
    recipe: Recipe, folder: Path, model: nn.Module, normalize: Normalize, num_classes: int, ranks: Ranks
) -> int:
    """`data.grad_accum_steps`, or for `auto` the fewest that this machine's memory allows.

    Raises:
        ValueError: the global batch cannot be shared, or not even one image fits.
    """
    data = recipe.data
    if data.grad_accum_steps != "auto":
        return data.grad_accum_steps
    if data.global_batch_size % ranks.world_size:
        raise ValueError(
            f"data.global_batch_size {data.global_batch_size} cannot be shared by {ranks.world_size} ranks"
        )
    rank_batch = data.global_batch_size // ranks.world_size
    known = ranks.on_primary(lambda: _read(folder / MICRO_BATCH_NAME, rank_batch))
    if known is None:
        side = max(data.resolutions.values())
        fits = _fits_on_gpu if ranks.device.type == "cuda" else _fits_on_cpu
        check = fits(recipe, model, normalize, num_classes, side, ranks)
        steps = max(ranks.gather(fewest_accum_steps(rank_batch, check)))
        if steps > rank_batch:
            raise ValueError(
                f"data.grad_accum_steps: not even one image of {side} px fits into memory: choose a smaller "
                "model or resolution, or model.gradient_checkpointing=true"
            )
        known = steps
        if ranks.is_primary:
            content = {"rank_batch_size": rank_batch, "grad_accum_steps": steps, "resolution": side}
            write_atomically(folder / MICRO_BATCH_NAME, (json.dumps(content) + "\n").encode())
    return known


def fewest_accum_steps(rank_batch: int, fits: Callable[[int], bool]) -> int:
    """The fewest equal micro-batches of which each fits; `rank_batch` + 1 where not even one image does."""
    divisors = [steps for steps in range(1, rank_batch + 1) if rank_batch % steps == 0]
    return next((steps for steps in divisors if fits(rank_batch // steps)), rank_batch + 1)


def _read(path: Path, rank_batch: int) -> int | None:
    try:
        content = read_json(path)
        steps = content["grad_accum_steps"] if content["rank_batch_size"] == rank_batch else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) and steps > 0 and rank_batch % steps == 0 else None


def _fits_on_gpu(
    recipe: Recipe, model: nn.Module, normalize: Normalize, num_classes: int, side: int, ranks: Ranks
) -> Callable[[int], bool]:
    device = ranks.device
    parameter_bytes, extra = _parameter_bytes(model), _further_copies(recipe)

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free, _ = torch.cuda.mem_get_info(device)
        before = torch.cuda.memory_allocated(device)
        try:
            with torch.random.fork_rng(devices=[device]):
                step = training_step(
                    recipe, without_sync(copy.deepcopy(model)), normalize, num_classes, side, size, device
                )
                step.compute()
                step.update()
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
        # The run's own model has its gradients and state beside the copy that was measured, plus buckets.
        used = torch.cuda.max_memory_allocated(device) - before + (2 + extra) * parameter_bytes
        torch.cuda.reset_peak_memory_stats(device)
        return used <= USABLE_FRACTION * free

    return fits


def _fits_on_cpu(
    recipe: Recipe, model: nn.Module, normalize: Normalize, num_classes: int, side: int, ranks: Ranks
) -> Callable[[int], bool]:
    held = {size: _bytes_held(recipe, model, normalize, num_classes, side, size, ranks) for size in (2, 4)}
    image_bytes = max(1, (held[4] - held[2]) // 2)
    fixed = max(0, held[2] - 2 * image_bytes) + (4 + _further_copies(recipe)) * _parameter_bytes(model)
    usable = usable_ram_bytes()
    if usable is None:
        raise ValueError("data.grad_accum_steps: this machine does not tell its memory: give a number")
    free = USABLE_FRACTION * usable / ranks.local_world_size

    return lambda size: fixed + size * image_bytes <= free


def _bytes_held(
    recipe: Recipe,
    model: nn.Module,
    normalize: Normalize,
    num_classes: int,
    side: int,
    size: int,
    ranks: Ranks,
) -> int:
    """Bytes that a micro-batch keeps from its forward for its backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    twin = without_sync(copy.deepcopy(model))
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        training_step(recipe, twin, normalize, num_classes, side, size, ranks.device).compute()
    return sum(storages.values())


def _further_copies(recipe: Recipe) -> int:
    """Of the weights: the average, and those that sharpness-aware minimization comes back to."""
    return (recipe.ema is not None) + (recipe.optimizer.sam is not None)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
