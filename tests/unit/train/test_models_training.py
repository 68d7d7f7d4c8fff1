"""Models in training: synchronized BatchNorm on CUDA, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from train.config import ModelSection
from train.models.build import build_model
from train.models.gradient_checkpointing import checkpoint_blocks, find_blocks
from train.models.heads import split_outputs
from train.models.sync_batchnorm import convert_sync_batchnorm

torch.set_num_threads(1)

CPU = torch.device("cpu")


def build(library: str, name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    changes = {"library": library, "name": name, "channels_last": False, **changes}
    return build_model(ModelSection.model_validate(changes), 7)


# BatchNorm over ranks: see test_models_ranks.py


def test_on_cuda_every_batchnorm_becomes_torchs_synchronized_one() -> None:
    model = build("timm", "test_efficientnet")
    keys = list(model.state_dict())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    converted = convert_sync_batchnorm(model, torch.device("cuda"))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == norms > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert list(converted.state_dict()) == keys
    with pytest.raises(ValueError, match=r"model\.sync_batchnorm: .* has no BatchNorm"):
        convert_sync_batchnorm(build("timm", "test_vit"), CPU)


# Gradient checkpointing


def step(model: nn.Module, side: int) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients and buffers after a step, and the bytes that it kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    images = torch.randn(4, 3, side, side)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, auxiliary = split_outputs(model.train()(images))
    kept_bytes = sum(kept.values())
    sum(one.square().sum() for one in [logits, *auxiliary]).backward()  # type: ignore[union-attr]
    result = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {**result, **dict(model.named_buffers())}, kept_bytes


@pytest.mark.parametrize(
    ("library", "name", "changes"),
    [
        ("timm", "test_resnet", {"stochastic_depth": 0.5, "dropout": 0.3}),
        ("timm", "test_vit", {}),
        ("timm", "test_efficientnet", {"activation": "silu"}),
        ("torchvision", "resnet18", {"stochastic_depth": 0.5, "blurpool": True}),
        ("torchvision", "densenet121", {}),
        ("torchvision", "mobilenet_v3_small", {"dropout": 0.4}),
        ("own", "residual_cnn", {"stochastic_depth": 0.5}),
    ],
)
def test_checkpointed_gradients_are_the_same_for_less_memory(
    library: str, name: str, changes: dict[str, Any]
) -> None:
    side = 160 if name == "test_vit" else 48
    plain = build(library, name, **changes)
    checkpointed = build(library, name, gradient_checkpointing=True, **changes)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    expected, much = step(plain, side)
    found, little = step(checkpointed, side)
    assert little < 0.75 * much
    assert expected.keys() == found.keys()
    for key, value in expected.items():  # running statistics count a batch once
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_blocks_are_those_of_the_architecture() -> None:
    resnet = build("torchvision", "resnet18")
    assert [type(block).__name__ for block in find_blocks(resnet)] == ["BasicBlock"] * 8
    with torch.device("meta"):
        convnext = get_model("convnext_tiny")
        inception = get_model("inception_v3", init_weights=False)
    assert {type(block).__name__ for block in find_blocks(convnext)} == {"CNBlock"}
    names = {type(block).__name__ for block in find_blocks(inception)}
    assert {"InceptionA", "InceptionC", "InceptionE"} < names


def test_checkpointing_needs_blocks() -> None:
    with torch.device("meta"):
        vgg = get_model("vgg11")
    with pytest.raises(ValueError, match=r"model\.gradient_checkpointing: VGG is not made of blocks"):
        checkpoint_blocks(vgg)
