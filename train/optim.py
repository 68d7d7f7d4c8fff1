"""Optimizers, with weight decay by the shape of a parameter, never by its name."""

from __future__ import annotations

import torch
from torch import nn

from train.config import OptimizerSection


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """SGD or AdamW at `peak_lr`; norms and biases (fewer than two dimensions) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.peak_lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
        )
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.momentum, 0.999))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, momentum: float | None) -> None:
    """Set the rate, and the momentum (AdamW: beta1) unless it is None, of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
