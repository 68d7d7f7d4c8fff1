"""The range test leaves nothing behind, treats groups as the training does, and says how sure it is."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.manifest import Manifest
from train.checkpoint import state_sha256
from train.config import DataSection, LrFinderSection, ModelSection, OptimizerSection
from train.data.batch import Normalize
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import Ranks
from train.lr_curve import judge
from train.lr_finder import LrFinderResult, find_learning_rate, save_result
from train.models.build import build_model
from train.optim import build_optimizer
from train.param_groups import set_trainable

Prepared = tuple[Path, Manifest]


def search(
    prepared: Prepared,
    model: nn.Module,
    end_lr: float = 3.0,
    stop: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    accum_steps: int = 1,
    precision: str = "fp32",
    loss_fn: Callable[..., torch.Tensor] = nn.functional.cross_entropy,
    clip: Callable[[], None] | None = None,
) -> LrFinderResult | None:
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    data = DataSection(path=prepared[0], global_batch_size=24, num_workers=0, grad_accum_steps=accum_steps)
    loader = build_loader("reference", LoaderPlan.training(*prepared, data, seed=0, ranks=ranks))
    return find_learning_rate(
        nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), model),
        optimizer or build_optimizer(model, OptimizerSection()),
        loss_fn,
        loader,
        LrFinderSection(enabled=True, num_steps=20, end_lr=end_lr),
        resolution=32,
        grad_accum_steps=accum_steps,
        precision=precision,
        ranks=ranks,
        wants_to_stop=lambda: stop,
        clip=clip,
    )


class Odd(nn.Module):
    """A small model with what is easily forgotten: a buffer outside state_dict, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build_model(ModelSection(name="test_resnet"), 4)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + self.training
        random.random(), np.random.rand()
        return self.dropout(self.body(images))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of all that a test could leave behind."""
    tensors = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        "torch": torch.get_rng_state(),
    }
    state = optimizer.state_dict()
    for key, values in state["state"].items():
        tensors |= {f"state.{key}.{name}": torch.as_tensor(value) for name, value in values.items()}
    words = [
        state["param_groups"],
        random.getstate(),
        [np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        sorted(vars(optimizer)),
    ]
    words += [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]
    return state_sha256({k: v.detach().clone() for k, v in tensors.items()}) + repr(words)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead_lamb"])
@pytest.mark.parametrize("ending", ["whole", "signal", "error"])
def test_everything_is_put_back(prepared: Prepared, name: str, ending: str) -> None:
    torch.manual_seed(0)
    model = Odd()
    set_trainable(model, ("body.layer4", "body.fc"))
    optimizer = build_optimizer(model, OptimizerSection(name=name, peak_lr=1e-3))
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()  # so that it has state
    model.train()
    model.body.layer1.eval()
    before = everything(model, optimizer)
    num_calls = 0

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if ending == "error" and num_calls == 5:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, labels)

    if ending == "error":
        with pytest.raises(KeyboardInterrupt):
            search(prepared, model, optimizer=optimizer, loss_fn=loss_fn)
    else:
        result = search(prepared, model, stop=ending == "signal", optimizer=optimizer, loss_fn=loss_fn)
        assert (result is None) == (ending == "signal")
    assert everything(model, optimizer) == before
    assert num_calls and all(parameter.grad is None for parameter in model.parameters())
    # It still works, on its own: nothing of the test's scheduler is left in it.
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert everything(model, optimizer) != before


def test_frozen_weights_and_statistics_take_no_part(prepared: Prepared) -> None:
    model = build_model(ModelSection(name="test_resnet"), 4)
    set_trainable(model, ("fc",))
    seen = []

    def note() -> None:
        seen.append(state_sha256({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}))
        seen.append(model.fc.weight.sum().item())

    search(prepared, model, clip=note)
    assert len(set(seen[0::2])) == 1 and len(set(seen[1::2])) > 5


def test_non_finite_loss_never_enters_the_curve(prepared: Prepared) -> None:
    factors = [1.0] * 12 + [float("nan")] * 20

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels) * factors.pop(0)

    model = build_model(ModelSection(name="test_resnet"), 4)
    result = search(prepared, model, end_lr=1e-3, loss_fn=loss_fn)
    assert result is not None and len(result.losses) == 12
    assert all(torch.isfinite(torch.tensor(result.losses)))


class Recorder(torch.optim.SGD):
    rates: ClassVar[list[list[float]]] = []

    def step(self, closure=None):
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def test_groups_keep_the_ratios_of_their_rates(prepared: Prepared) -> None:
    model = build_model(ModelSection(name="test_resnet"), 4)
    body = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    groups = [{"params": body, "lr_scale": 0.1}, {"params": list(model.fc.parameters()), "lr_scale": 1.0}]
    Recorder.rates.clear()
    result = search(prepared, model, optimizer=Recorder(groups, lr=0.7), end_lr=1.0)
    assert result is not None
    rates = np.array(Recorder.rates)
    np.testing.assert_allclose(rates[:, 0], 0.1 * rates[:, 1])
    np.testing.assert_allclose(rates[: len(result.learning_rates), 1], result.learning_rates)
    np.testing.assert_allclose(rates[[0, -1], 1], [1e-4, 1.0])


def test_accumulated_batches_give_the_curve_of_the_whole_batch(prepared: Prepared) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4))
    whole, parts = search(prepared, model), search(prepared, copy.deepcopy(model), accum_steps=2)
    assert whole is not None and parts is not None
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precisions(prepared: Prepared, precision: str) -> None:
    dtypes = set()

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        dtypes.add((logits.dtype, inner[0].dtype))
        return nn.functional.cross_entropy(logits, labels)

    model, inner = build_model(ModelSection(name="test_resnet"), 4), []
    model.fc.register_forward_hook(lambda module, inputs, output: inner.insert(0, output))
    assert search(prepared, model, precision=precision, loss_fn=loss_fn) is not None
    assert dtypes == {(torch.float32, torch.bfloat16 if precision == "bf16" else torch.float32)}


# Reading the curve

RATES = np.geomspace(1e-4, 3.0, 60)


def curve(noise: float, lowest: float = 0.3, depth: float = 1.5) -> list[float]:
    """A loss that falls from 2.3 to its minimum at the rate `lowest`, then rises."""
    distance = np.log(RATES / lowest)
    fall = depth * np.exp(-0.5 * (distance / 1.2) ** 2)
    generator = np.random.default_rng(3)
    return (2.3 - fall + np.where(distance > 1, distance - 1, 0) + noise * generator.normal(size=60)).tolist()


def test_a_clear_curve_is_sure_and_a_noisy_one_is_not() -> None:
    clear = judge(RATES.tolist(), curve(noise=0.01), 1.0)
    assert clear.confidence == "high" and clear.choice == pytest.approx(0.3, rel=0.2)
    noisy = judge(RATES.tolist(), curve(noise=0.5), 1.0)
    assert noisy.confidence == "low" and "times the noise" in noisy.confidence_reason
    for result in (clear, noisy):
        assert result.choice_low <= result.choice <= result.choice_high  # type: ignore[operator]
    assert noisy.choice_high / noisy.choice_low > clear.choice_high / clear.choice_low  # type: ignore[operator]
    assert judge(RATES.tolist(), curve(noise=0.5), 1.0) == noisy  # one curve, one answer


def test_range_holds_the_true_minimum_and_follows_the_fraction() -> None:
    whole, tenth = (judge(RATES.tolist(), curve(noise=0.1), fraction) for fraction in (1.0, 0.1))
    assert whole.choice_low <= 0.3 <= whole.choice_high  # type: ignore[operator]
    assert tenth.choice_high == pytest.approx(0.1 * whole.choice_high)  # type: ignore[operator]


def test_a_minimum_at_the_edge_or_none_is_no_sure_choice() -> None:
    falling = judge(RATES.tolist(), curve(noise=0.01, lowest=30.0), 1.0)
    assert falling.confidence == "low" and "last rate" in falling.confidence_reason
    flat = judge(RATES.tolist(), [2.3] * 60, 1.0)
    assert flat.choice is None and flat.choice_low is None and flat.confidence == "low"


def test_range_and_confidence_are_saved_and_drawn(tmp_path: Path) -> None:
    result = judge(RATES.tolist(), curve(noise=0.05), 1.0)
    save_result(result, tmp_path, 0.3)
    saved = json.loads((tmp_path / "lr_finder.json").read_text())
    assert saved["choice_low"] == result.choice_low and saved["confidence"] == result.confidence
    with_band = (tmp_path / "lr_finder.png").read_bytes()
    save_result(LrFinderResult(result.learning_rates, result.losses, 0.3, ""), tmp_path, 0.3)
    assert (tmp_path / "lr_finder.png").read_bytes() != with_band
