"""Schedules: the cycle equals torch's own, the plateau takes over at a rate of its own and acts."""

from __future__ import annotations

import pytest
import torch

from train.config import OneCyclePhase, OptimizerSection, PlateauPhase, ScheduleSection
from train.optim import build_optimizer
from train.schedule import Schedule, one_cycle


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5])
def test_one_cycle_equals_torch(warmup: float) -> None:
    phase = OneCyclePhase(epochs=1, warmup_fraction=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=200, pct_start=warmup, base_momentum=0.85, max_momentum=0.95
    )
    for step in range(200):
        rate, momentum = one_cycle(step, 200, 0.4, 0.95, phase)
        group = optimizer.param_groups[0]
        assert rate == pytest.approx(group["lr"], rel=1e-6)
        assert momentum == pytest.approx(group["momentum"], rel=1e-6)
        optimizer.step()
        if step < 199:
            theirs.step()


def build(name: str = "sgd", patience: int = 0) -> tuple[Schedule, torch.optim.Optimizer]:
    section = ScheduleSection(
        phases=(
            OneCyclePhase(epochs=2),
            PlateauPhase(epochs=4, initial_lr_fraction=0.05, momentum=0.7, patience=patience),
        )
    )
    config = OptimizerSection(name=name, peak_lr=0.4)
    return Schedule(section, config, num_steps_per_epoch=10), build_optimizer(torch.nn.Linear(2, 2), config)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_plateau_takes_over_with_its_own_rate_and_momentum(name: str) -> None:
    schedule, optimizer = build(name)
    assert schedule.begin_step(optimizer, 19) == pytest.approx(0.4 / 25e4)
    assert schedule.begin_step(optimizer, 20) == pytest.approx(0.02)
    group = optimizer.param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7
    assert all(g["lr"] == pytest.approx(0.02) for g in optimizer.param_groups)


def test_plateau_cuts_when_the_loss_stops_falling() -> None:
    schedule, optimizer = build()
    schedule.end_epoch(1.0, steps_done=20)  # the cycle's last epoch is not the plateau's
    rates = []
    for epoch, loss in enumerate([0.9, 0.8, 0.8, 0.9], start=3):
        rates.append(schedule.begin_step(optimizer, (epoch - 1) * 10))
        schedule.end_epoch(loss, steps_done=epoch * 10)
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.002])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0002)


def test_plateau_remembers_over_a_restart() -> None:
    calm, optimizer = build(patience=1)
    losses = [0.9, 0.95, 0.94, 0.93]

    def epoch(schedule: Schedule, optimizer: torch.optim.Optimizer, number: int) -> float:
        rate = schedule.begin_step(optimizer, 20 + number * 10)
        schedule.end_epoch(losses[number], steps_done=30 + number * 10)
        return rate

    expected = [epoch(calm, optimizer, number) for number in range(4)]
    first, first_optimizer = build(patience=1)
    rates = [epoch(first, first_optimizer, number) for number in range(2)]
    second, second_optimizer = build(patience=1)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second.load_state_dict(first.state_dict(), second_optimizer)
    rates += [epoch(second, second_optimizer, number) for number in range(2, 4)]
    assert rates == expected and expected[-1] < expected[0]


def test_norms_and_biases_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimizerSection(weight_decay=0.1))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight), id(model[2].weight)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("num_steps", "warmup"), [(2, 0.5), (4, 0.25), (10, 0.1), (1, 0.3)])
def test_shortest_cycles(num_steps: int, warmup: float) -> None:
    phase = OneCyclePhase(epochs=1, warmup_fraction=warmup)
    rates = [one_cycle(step, num_steps, 0.4, 0.9, phase)[0] for step in range(num_steps)]
    assert all(0 <= rate <= 0.4 for rate in rates)
