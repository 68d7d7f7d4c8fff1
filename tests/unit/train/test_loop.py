"""Draws of a step, and when its gradients travel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.loop import micro_seed, seed_step, sync_gradients


def test_draws_follow_seed_step_and_rank_alone() -> None:
    def draw(*place: int) -> tuple[float, ...]:
        seed_step(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 4_099) for rank in (0, 1)]
    first = [draw(*place) for place in places]
    assert len(set(first)) == len(places) and [draw(*place) for place in places] == first


def test_every_micro_batch_is_augmented_in_its_own_way() -> None:
    places = [(s, t, r, p) for s in (0, 1) for t in (0, 1, 1_031) for r in (0, 1) for p in (0, 1, 1_030)]
    assert len({micro_seed(*place) for place in places}) == len(places)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_travel_with_the_last_micro_batch_only(alone: None) -> None:
    wrapped = DistributedDataParallel(nn.Linear(2, 2))
    for is_last in (False, True):
        with sync_gradients(wrapped, is_last):
            assert wrapped.require_backward_grad_sync is is_last
