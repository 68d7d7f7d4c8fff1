"""SAM against its formula on a quadratic, with a scaler's factor, and its way back bit for bit."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from train.clip import total_grad_norm
from train.sam import perturb, restore, without_running_statistics

CURVATURE = torch.tensor([1.0, 10.0, 100.0])


def quadratic(weight: torch.Tensor) -> torch.Tensor:
    return 0.5 * (CURVATURE * weight**2).sum()


@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_gradient_is_that_of_the_worst_place_nearby(factor: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    start = weight.detach().clone()
    (factor * quadratic(weight)).backward()
    copies = perturb([weight], 0.1, total_grad_norm([weight]))
    gradient = CURVATURE * start
    place = start + 0.1 * gradient / gradient.norm()
    torch.testing.assert_close(weight.detach(), place)
    assert (weight.detach() - start).norm() == pytest.approx(0.1, rel=1e-4)
    # To first order the loss rises by rho · ‖g‖, the most that a step this long can do.
    weight.grad = None
    (factor * quadratic(weight)).backward()
    torch.testing.assert_close(weight.grad / factor, CURVATURE * place)
    restore([weight], copies)
    assert torch.equal(weight, start)
    torch.testing.assert_close(weight.grad / factor, CURVATURE * place)


def test_loss_rises_by_rho_times_the_norm() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    loss = quadratic(weight)
    loss.backward()
    norm = total_grad_norm([weight])
    perturb([weight], 1e-3, norm)
    assert (quadratic(weight) - loss).item() == pytest.approx(1e-3 * norm.item(), rel=0.02)


def test_a_model_comes_back_bit_for_bit_whatever_its_gradients() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    parameters[0].grad = None  # frozen
    parameters[1].grad.fill_(float("nan"))
    copies = perturb(parameters, 0.05, total_grad_norm(parameters))
    assert torch.equal(parameters[0], before[0]) and not torch.equal(parameters[2], before[2])
    restore(parameters, copies)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_gradients_of_zero_move_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    perturb([weight], 0.05, total_grad_norm([weight]))
    assert torch.equal(weight, torch.ones(3))


def test_second_pass_leaves_running_statistics() -> None:
    norm, frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
    model = nn.Sequential(norm, frozen)
    images = 5 + torch.randn(8, 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with without_running_statistics(model):
        second = model(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    first = model(images)
    assert torch.equal(first, second)  # normalized by the batch both times
    assert not torch.equal(norm.running_mean, before["0.running_mean"])
