"""The range test leaves nothing behind: weights, buffers, gradients and generator are as before."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from data_prep.manifest import Manifest
from train.checkpoint import state_sha256
from train.config import DataSection, LrFinderSection, ModelSection, OptimizerSection
from train.data.batch import Normalize
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import Ranks
from train.lr_finder import LrFinderResult, find_learning_rate
from train.models.build import build_model
from train.optim import build_optimizer


def search(
    prepared: tuple[Path, Manifest], model: nn.Module, end_lr: float = 3.0, stop: bool = False
) -> LrFinderResult | None:
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    data = DataSection(path=prepared[0], global_batch_size=24, num_workers=0)
    loader = build_loader("reference", LoaderPlan.training(*prepared, data, seed=0, ranks=ranks))
    return find_learning_rate(
        nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), model),
        build_optimizer(model, OptimizerSection()),
        nn.CrossEntropyLoss(),
        loader,
        LrFinderSection(enabled=True, num_steps=20, end_lr=end_lr),
        resolution=32,
        grad_accum_steps=1,
        precision="fp32",
        ranks=ranks,
        wants_to_stop=lambda: stop,
    )


def test_everything_is_put_back(prepared: tuple[Path, Manifest]) -> None:
    torch.manual_seed(0)
    model = build_model(ModelSection(name="test_resnet"), 4)
    weights, generator = state_sha256(model.state_dict()), torch.get_rng_state()
    result = search(prepared, model)
    assert result is not None and len(result.losses) >= 10
    assert state_sha256(model.state_dict()) == weights
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_non_finite_loss_never_enters_the_curve(prepared: tuple[Path, Manifest]) -> None:
    result = search(prepared, build_model(ModelSection(name="test_resnet"), 4), end_lr=1e30)
    assert result is not None and len(result.losses) < 20
    assert all(torch.isfinite(torch.tensor(result.losses)))


def test_signal_ends_it(prepared: tuple[Path, Manifest]) -> None:
    assert search(prepared, build_model(ModelSection(name="test_resnet"), 4), stop=True) is None
