"""Gradient clipping, and the norm of all gradients, without a wait for the device.

Call after the gradient scaler's `unscale_` and after the last micro-batch's backward: under DDP gradients are
then equal on all ranks, and so is what comes out.

Example:
    >>> norm = total_grad_norm(parameters)                   # for the log, SAM and clipping alike
    >>> clip_gradients(parameters, ClipSection(kind="norm", limit=1.0), total_norm=norm)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from train.config import ClipSection


def total_grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm of all gradients as one vector: shape (), on their device; 0 without gradients."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    config: ClipSection,
    head_parameters: Iterable[nn.Parameter] = (),
    total_norm: torch.Tensor | None = None,
) -> None:
    """Clip in place.

    `norm` scales all gradients so that their total norm is `limit` at most; `value` cuts each element at
    ±`limit`; `agc` limits the norm of each unit's gradient to `limit` times that of its weights (Brock et
    al., 2021, who leave out the head, and take 0.01 to 0.16).

    Args:
        head_parameters: of the head, left out by `agc`.
        total_norm: as `total_grad_norm` gave it, where it is known: it is then not computed again.
    """
    if config.kind == "norm":
        norm = total_grad_norm(parameters) if total_norm is None else total_norm
        nn.utils.clip_grads_with_norm_(parameters, config.limit, norm)
    elif config.kind == "value":
        nn.utils.clip_grad_value_(parameters, config.limit)
    else:
        head = {id(parameter) for parameter in head_parameters}
        adaptive_clip_grad([p for p in parameters if id(p) not in head], clip_factor=config.limit)
