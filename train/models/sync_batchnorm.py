"""BatchNorm with the statistics of all ranks' images, in every step.

On CUDA these are torch's layers (timm's for its fused BatchNormAct2d). They refuse CPU tensors, so on the CPU
(gloo) BatchNorm layers get a forward pass that sums over ranks itself. State dict keys are BatchNorm's.

Example:
    >>> model = convert_sync_batchnorm(model.to(ranks.device), ranks.device)  # before DDP
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.models.specialize import specialize


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm over all ranks; each rank must have the same number of images.

    Raises:
        ValueError: the model has no BatchNorm.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if not norms:
        raise ValueError(f"model.sync_batchnorm: {type(model).__name__} has no BatchNorm; set it to false")
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm as convert

        return convert(model)
    for norm in norms:
        if not isinstance(norm, _GlobalBatchNorm):
            specialize(norm, _GlobalBatchNorm)
    return model


def without_sync(model: nn.Module) -> nn.Module:
    """`model` with BatchNorm over this rank's images only: for measurements that ranks make on their own.

    There each rank takes as many passes as it has time for, and sums over ranks would not find partners.
    """
    for norm in model.modules():
        if isinstance(norm, _GlobalBatchNorm):
            norm.is_alone = True
    return model if not _has_torchs_own(model) else _revert(model)


def _has_torchs_own(model: nn.Module) -> bool:
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def _revert(module: nn.Module) -> nn.Module:
    """torch's SyncBatchNorm layers as BatchNorm2d ones with the same parameters."""
    if isinstance(module, nn.SyncBatchNorm):
        plain = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
        plain.load_state_dict(module.state_dict())
        for name in ("drop", "act"):  # of timm's, which go on with these two
            if hasattr(module, name):
                plain = nn.Sequential(plain, getattr(module, name))  # type: ignore[assignment]
        return plain.to(next(iter([*module.parameters(), *module.buffers()])).device).train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _revert(child))
    return module


class _GlobalBatchNorm(nn.Module):
    """A BatchNorm layer whose batch is that of all ranks; alone, or evaluating, it is the layer as it was."""

    is_alone = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_alone or not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        out = _normalize(self, x)
        # timm's BatchNormAct2d goes on with these two.
        if hasattr(self, "drop") and hasattr(self, "act"):
            out = self.act(self.drop(out))  # type: ignore[operator]
        return out


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """`x` (N, C, …) by mean and variance over all ranks; updates the running statistics.

    The variance is of centred values, in a second sum over ranks: from sums of squares, fp32 would cancel.
    """
    values = x.float()
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *([1] * (x.ndim - 2))]
    count = x.numel() // x.shape[1] * dist.get_world_size()
    mean = _sum_over_ranks(values.sum(dims)) / count
    centred = values - mean.view(shape)
    variance = _sum_over_ranks(centred.square().sum(dims)) / count
    if norm.track_running_stats and norm.running_mean is not None:
        _update_statistics(norm, mean.detach(), variance.detach(), count)
    out = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


def _update_statistics(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        # momentum null is a plain mean over all batches, as in torch.
        momentum = 1.0 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on the sum, so its gradient is summed over ranks as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(values: Tensor) -> Tensor:
    return _SumOverRanks.apply(values)
