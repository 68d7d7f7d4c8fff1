"""What concerns the residual blocks of a network: the start of their last norm, and stochastic depth.

Example:
    >>> init_last_norms(model, zero=True)  # every block begins as the identity (Goyal et al., 2017)
    >>> set_stochastic_depth(torchvision_model, 0.1)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, regnet, resnet
from torchvision.ops import StochasticDepth, stochastic_depth

from train.models.residual_cnn import ResidualBlock
from train.models.specialize import specialize

_RESNET_BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)
_BLOCKS = (
    *_RESNET_BLOCKS,
    ResidualBlock,
    regnet.ResBottleneckBlock,
    mobilenetv2.InvertedResidual,
    mobilenetv3.InvertedResidual,
    efficientnet.MBConv,
    efficientnet.FusedMBConv,
)
_IDENTITY_PATHS = ("downsample", "proj", "shortcut")


def init_last_norms(model: nn.Module, zero: bool) -> int:
    """Weight of the last norm of every residual block at 0 or 1; how many there are.

    Raises:
        ValueError: the model has no residual block whose last norm can be found.
    """
    norms = [norm for block in model.modules() for norm in _last_norms(block)]
    if not norms:
        raise ValueError(
            f"model.zero_init_last_norm: {type(model).__name__} has no residual block whose last norm can be "
            "found; leave it null"
        )
    for norm in norms:
        nn.init.constant_(norm.get_parameter("weight"), 0.0 if zero else 1.0)
    return len(norms)


def _last_norms(block: nn.Module) -> list[nn.Module]:
    if isinstance(block, _BLOCKS):
        if not getattr(block, "use_res_connect", True):
            return []  # an inverted residual block that changes the shape has no identity path
        norms = [m for name, m in _norms(block) if not name.startswith(_IDENTITY_PATHS)]
        return norms[-1:]
    if callable(getattr(block, "zero_init_last", None)):
        return _zeroed_by_timm(block)
    return []


def _norms(block: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1 and "norm" in type(module).__name__.lower():
            found.append((name, module))
    return found


def _zeroed_by_timm(block: nn.Module) -> list[nn.Module]:
    """The norms that a block of timm zeroes itself: only it knows which one is last."""
    tensors = [tensor for tensor in block.parameters() if not tensor.is_meta]
    before = [tensor.detach().clone() for tensor in tensors]
    norms = [norm for _, norm in _norms(block)]
    with torch.no_grad():
        for norm in norms:
            norm.get_parameter("weight").fill_(1.0)
        block.zero_init_last()  # type: ignore[operator]
        last = [norm for norm in norms if not norm.get_parameter("weight").any()]
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    return last


def set_stochastic_depth(model: nn.Module, rate: float) -> None:
    """Drop residual branches of a torchvision model in training, by image (Huang et al., 2016).

    The rate rises linearly from 0 at the first block to `rate` at the last. Models that have stochastic depth
    get these rates; the blocks of ResNets get it.

    Raises:
        ValueError: neither.
    """
    blocks: list[nn.Module] = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    if blocks:
        for layer, probability in zip(blocks, _rising(rate, len(blocks)), strict=True):
            layer.p = probability  # type: ignore[assignment]
        return
    blocks = [m for m in model.modules() if isinstance(m, _RESNET_BLOCKS)]
    if not blocks:
        raise ValueError(
            f"model.stochastic_depth: {type(model).__name__} has no residual branch to drop; set it to 0"
        )
    for block, probability in zip(blocks, _rising(rate, len(blocks)), strict=True):
        block.drop_probability = probability  # type: ignore[assignment]
        specialize(block, _DroppedBasic if isinstance(block, resnet.BasicBlock) else _DroppedBottleneck)


def _rising(rate: float, count: int) -> list[float]:
    return [
        rate * (index + 1) / count if count == 1 else rate * index / (count - 1) for index in range(count)
    ]


class _DroppedBasic(nn.Module):
    """Torchvision's BasicBlock with stochastic depth."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return _join(self, x, out)


class _DroppedBottleneck(nn.Module):
    """Torchvision's Bottleneck with stochastic depth."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return _join(self, x, out)


def _join(block: Any, x: Tensor, out: Tensor) -> Tensor:
    identity = x if block.downsample is None else block.downsample(x)
    dropped = stochastic_depth(out, block.drop_probability, "row", block.training)
    return block.relu(dropped + identity)
