"""Convolutions that oneDNN computes wrongly on CPUs are kept out of its way.

The gradient of a 1 × 1 convolution with a stride, of fewer channels than a vector holds (8 with AVX2, 16 with
AVX-512), in channels-last order: its kernel writes behind its workspace, and the result is wrong, the process
dies, or its threads wait for each other for ever (github.com/uxlfoundation/oneDNN/issues/6035; seen here in a
training with torch 2.15, half an hour in one step). In the usual order another kernel is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VECTOR_CHANNELS = 16


def avoid_narrow_strided_convs(model: nn.Module) -> None:
    """Let these convolutions see contiguous (NCHW) input and weights; in place. CUDA sees them as before."""
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.in_channels // module.groups < VECTOR_CHANNELS
        ):
            # Of 1 × 1 both orders are the same bytes, but the strides say which one is meant.
            weight = module.weight.detach()
            order = torch.contiguous_format
            module.weight.data = torch.empty_like(weight, memory_format=order).copy_(weight)
            module.register_forward_pre_hook(_in_usual_order)


def _in_usual_order(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    (images,) = inputs
    return (images if images.is_cuda else images.contiguous(),)
