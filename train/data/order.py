"""Which samples, when, on which rank: pure functions, tested without a GPU.

Global batch t of an epoch is slice t of the epoch's permutation. A rank takes its contiguous share of each,
a micro-batch its share of that. So any world size walks through the same samples in the same steps.
"""

from __future__ import annotations

import numpy as np

SHUFFLE_STREAM = 1  # told apart from the streams of augment.py, which share seed and epoch


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of the sample ids of one epoch: int64, shape (num_samples,)."""
    key = np.array([seed, (epoch << 8) | SHUFFLE_STREAM], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)


def num_steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Whole global batches of an epoch; what is left over differs from epoch to epoch."""
    return num_samples // global_batch_size


def rank_micro_batches(
    order: np.ndarray,
    start_sample: int,
    global_batch_size: int,
    grad_accum_steps: int,
    rank: int,
    world_size: int,
) -> list[np.ndarray]:
    """This rank's micro-batches from `start_sample` on, `grad_accum_steps` of them a step.

    Args:
        order: the epoch's permutation, shape (num_samples,).
        start_sample: samples of this epoch already consumed by all ranks; whole global batches.

    Returns:
        arrays of sample ids, each of shape (global_batch_size / world_size / grad_accum_steps,).
    """
    check_batch_size(global_batch_size, grad_accum_steps, world_size)
    assert start_sample % global_batch_size == 0, "a run stops between steps"
    micro_batch_size = global_batch_size // (world_size * grad_accum_steps)
    num_steps = num_steps_per_epoch(len(order), global_batch_size)
    batches = order[: num_steps * global_batch_size]
    batches = batches.reshape(num_steps, world_size, grad_accum_steps, micro_batch_size)
    remaining = batches[start_sample // global_batch_size :, rank]
    return list(remaining.reshape(-1, micro_batch_size))


def rank_validation_batches(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> list[np.ndarray]:
    """Whole batches dealt out to ranks in turn; every sample once, nothing padded, the last may be short.

    The batches are the same at any world size, so that sums over them are, too.
    """
    ids = np.arange(num_samples)
    return [ids[start : start + batch_size] for start in range(0, num_samples, batch_size)][rank::world_size]


def check_batch_size(global_batch_size: int, grad_accum_steps: int, world_size: int) -> None:
    """Raise ValueError where a global batch cannot be shared out evenly."""
    if global_batch_size % (world_size * grad_accum_steps):
        raise ValueError(
            f"data.global_batch_size {global_batch_size} cannot be shared by {world_size} ranks × "
            f"{grad_accum_steps} micro-batches: choose a multiple of {world_size * grad_accum_steps}"
        )
