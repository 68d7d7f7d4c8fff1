"""Loss spikes: told from noise and from new levels, the same after a restart, skipped where wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.train.test_update import ALONE
from train.config import LossSpikeSection, OptimizerSection
from train.loss_spike import LossSpikes
from train.update import Updater

CPU = torch.device("cpu")


def noise(num_steps: int, level: float = 2.0, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.1 * level * torch.randn(num_steps, generator=generator)).tolist()


def found(losses: list[float], spikes: LossSpikes | None = None) -> list[int]:
    spikes = spikes or LossSpikes(LossSpikeSection(), CPU)
    zero = torch.zeros(())
    return [n for n, loss in enumerate(losses) if float(spikes.look(torch.tensor(loss), zero))]


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    assert found(noise(2000)) == []
    falling = [loss * 0.999**n for n, loss in enumerate(noise(3000))]
    assert found(falling) == []


def test_a_spike_is_found_and_is_not_taken_for_usual() -> None:
    losses = noise(300)
    losses[100], losses[200] = 9.0, 9.0
    assert found(losses) == [100, 200]


def test_a_new_level_is_taken_for_usual_after_a_few_steps() -> None:
    assert found(noise(200) + noise(200, 20.0)) == [200, 201, 202]


def test_the_first_steps_and_failed_ones_are_never_spikes() -> None:
    assert found([2.0] * 20 + [50.0] + [2.0] * 10) == []
    spikes = LossSpikes(LossSpikeSection(), CPU)
    found(noise(100), spikes)
    assert not float(spikes.look(torch.tensor(float("nan")), torch.ones(())))
    assert found([2.0], spikes) == [] and bool(spikes.state_dict()["state"].isfinite().all())


def test_what_it_remembers_survives_a_restart() -> None:
    first, second = (LossSpikes(LossSpikeSection(), CPU) for _ in range(2))
    found(noise(120), first)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    losses = [*noise(50, seed=1), 9.0]
    assert found(losses, first) == found(losses, second) == [50]
    assert int(first.num_spikes) == int(second.num_spikes) == 1


@pytest.mark.parametrize("action", ["report", "skip"])
def test_a_spike_changes_weights_only_where_it_is_reported(action: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = OptimizerSection(loss_spike=LossSpikeSection(action=action))  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    updater = Updater(model, [model], optimizer, scaler, config, ALONE)

    def step(loss_value: float) -> bool:
        before = model.weight.detach().clone()
        updater.begin()
        model(torch.ones(1, 3)).sum().backward()
        updater.end(torch.tensor(loss_value))
        return not torch.equal(before, model.weight)

    assert all(step(loss) for loss in noise(80))
    assert step(50.0) is (action == "report")
    assert step(2.0)
    assert int(updater.spikes.num_spikes) == 1 and int(updater.num_skipped) == (action == "skip")
    assert not updater.gave_up
