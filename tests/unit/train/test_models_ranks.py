"""BatchNorm over ranks, in real processes, which run this file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from tests.integration.launch import run
from train.models.sync_batchnorm import convert_sync_batchnorm

torch.set_num_threads(1)

CPU = torch.device("cpu")


def small_network() -> nn.Module:
    """Plain and fused BatchNorm, one with a mean over all batches, one behind checkpointing."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 5, 3),
        BatchNormAct2d(5, act_layer=nn.SiLU),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
        nn.BatchNorm1d(4, affine=False),
    )
    for norm in (network[1], network[3]):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    return network


def whole_batch() -> torch.Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 3 + 5


def two_steps(network: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    images = batch.clone().requires_grad_()
    for _ in range(2):
        output = network(images)
        weights = torch.linspace(-1, 2, output[0].numel()).view_as(output[0])
        (output * weights).square().sum().backward()
    evaluated = network.eval()(batch)
    assert images.grad is not None
    state = {f"state {key}": value for key, value in network.state_dict().items()}
    parameters = {f"gradient {key}": p.grad for key, p in network.named_parameters() if p.grad is not None}
    return {
        "output": output.detach(),
        "images": images.grad,
        "evaluated": evaluated.detach(),
        **state,
        **parameters,
    }


def one_rank(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    network = convert_sync_batchnorm(small_network(), CPU)
    torch.save(two_steps(network, whole_batch()[rank * 4 : rank * 4 + 4]), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_batchnorm_over_two_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    result = run("tests.unit.train.test_models_ranks", str(tmp_path), num_ranks=2)
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = two_steps(small_network(), whole_batch())
    assert ranks[0].keys() == whole.keys()
    for key, value in whole.items():
        if key in ("output", "images", "evaluated"):
            torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), value, rtol=1e-5, atol=1e-5)
        elif key.startswith("gradient"):
            torch.testing.assert_close(ranks[0][key] + ranks[1][key], value, rtol=1e-5, atol=1e-4)
        else:
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-6, atol=1e-6)
            assert torch.equal(ranks[0][key], ranks[1][key]), key


def test_converted_batchnorm_alone_is_the_layer_itself() -> None:
    plain, converted = small_network(), convert_sync_batchnorm(small_network(), CPU)
    first, second = two_steps(plain, whole_batch()), two_steps(converted, whole_batch())
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


if __name__ == "__main__":
    one_rank(sys.argv[1])
