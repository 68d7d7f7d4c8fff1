"""The update: skips that leave no trace, and the averaged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from train.config import ClipSection, EmaSection, OptimizerSection
from train.distributed import Ranks
from train.ema import Ema, decay_at
from train.update import FP16_SEARCH_STEPS, Updater

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU, 1)
IMAGES = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def updater_of(
    model: nn.Module, scaler_enabled: bool = False, **section: object
) -> tuple[Updater, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=scaler_enabled)
    config = OptimizerSection.model_validate(section)
    return Updater(model, [model[3]], optimizer, scaler, config, ALONE), optimizer  # type: ignore[index]


def step(model: nn.Module, updater: Updater, factor: float = 1.0) -> None:
    updater.begin()
    loss = model(IMAGES * factor).square().mean()
    updater._scaler.scale(loss).backward()
    updater.end(loss)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_no_trace(bad: float) -> None:
    model = small_model()
    updater, optimizer = updater_of(model)
    step(model, updater)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    step(model, updater, bad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]) or name.endswith("num_batches_tracked"), name
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[1][index]["momentum_buffer"])
    assert float(updater.num_skipped) == 1 and not updater.gave_up
    step(model, updater)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])
    assert float(updater.num_skipped) == 1 and all(p.grad is None for p in model.parameters())


def test_gives_up_after_the_stated_number_in_a_row() -> None:
    model = small_model()
    updater, _ = updater_of(model, max_skipped_steps=2)
    gave_up = []
    for factor in (float("nan"),) * 2 + (1.0,) + (float("nan"),) * 3:
        step(model, updater, factor)
        gave_up.append(bool(updater.gave_up))
    assert gave_up == [False] * 5 + [True]


def test_fp16_may_look_for_its_scale_first() -> None:
    model = small_model()
    updater, _ = updater_of(model, scaler_enabled=True, max_skipped_steps=0)
    for _ in range(FP16_SEARCH_STEPS):
        step(model, updater, float("nan"))
    assert not updater.gave_up
    step(model, updater, float("nan"))
    assert updater.gave_up and bool(model[1].running_mean.isfinite().all())


@pytest.mark.parametrize("clip", [None, ClipSection(limit=0.01)])
def test_norm_is_reported_unclipped_and_clipping_bounds_the_update(clip: ClipSection | None) -> None:
    model = small_model()
    updater, _ = updater_of(model, clip=clip)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    twin = copy.deepcopy(model)
    twin(IMAGES).square().mean().backward()
    true_norm = nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    step(model, updater)
    assert float(updater.grad_norm) == pytest.approx(float(true_norm), rel=1e-5)
    moved = nn.utils.get_total_norm([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved) == pytest.approx(0.1 * min(float(true_norm), 0.01 if clip else 9e9), rel=1e-3)


def test_average_equals_its_formula_with_warmup_and_intervals() -> None:
    model = small_model()
    config = EmaSection(decay=0.8, every_steps=2, warmup=True)
    ema = Ema(model, config)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for steps_done in range(1, 31):
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        model[1].num_batches_tracked += 1
        ema.update(steps_done)
        if steps_done % 2 == 0:
            updates = steps_done // 2 - 1
            decay = min(0.8**2, (1 + updates) / (10 + updates))
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in ema.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert ema.model[1].num_batches_tracked == 30  # type: ignore[index]
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_warmup_limits_the_first_decays_only() -> None:
    config = EmaSection(decay=0.999)
    assert decay_at(config, 0) == pytest.approx(0.1) and decay_at(config, 90) == pytest.approx(0.91)
    assert decay_at(config, 10**6) == 0.999
    assert decay_at(EmaSection(decay=0.999, warmup=False), 0) == 0.999
