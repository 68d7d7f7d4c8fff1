"""Sharpness-aware minimization: the gradient is taken where, nearby, the loss is highest.

Foret et al., 2021. A step is: backward; `perturb`; backward again with the same batch; `restore`; then the
optimizer's step with the second gradient. It costs two passes, so it is often done in every n-th step only.

Example:
    >>> copies = perturb(parameters, rho=0.05, grad_norm=total_grad_norm(parameters))
    >>> optimizer.zero_grad(set_to_none=True)
    >>> with without_running_statistics(model):     # a BatchNorm counts the batch once
    ...     criterion(model(images), labels).backward()
    >>> restore(parameters, copies)
    >>> optimizer.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def perturb(parameters: Sequence[nn.Parameter], rho: float, grad_norm: torch.Tensor) -> list[torch.Tensor]:
    """Move the weights by `rho` along the gradient, in place: w + rho · g / ‖g‖.

    A gradient scaler's factor is in g and in ‖g‖ and cancels out, so there is no need to unscale first. Under
    DDP both are equal on all ranks, which therefore move alike.

    Args:
        grad_norm: of all these gradients, shape (), on their device; see `train.clip.total_grad_norm`.

    Returns:
        Copies of all weights, for `restore`. Non-finite gradients do harm only until then.
    """
    weights = [parameter.detach() for parameter in parameters]
    copies = [torch.empty_like(weight) for weight in weights]
    if not weights:
        return copies
    torch._foreach_copy_(copies, weights)
    moved = [(p.detach(), p.grad) for p in parameters if p.grad is not None]
    if moved:
        factor = rho / (grad_norm + torch.finfo(grad_norm.dtype).tiny)  # a gradient of zeros moves nothing
        steps = torch._foreach_mul([gradient for _, gradient in moved], factor)
        torch._foreach_add_([weight for weight, _ in moved], steps)
    return copies


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], copies: list[torch.Tensor]) -> None:
    """Put back the weights that `perturb` copied, bit for bit; gradients stay.

    Subtracting the perturbation would leave rounding errors, which add up over the steps.
    """
    if copies:
        torch._foreach_copy_([parameter.detach() for parameter in parameters], copies)


@contextlib.contextmanager
def without_running_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorms use the batch's statistics and do not note them: the second pass sees no new images."""
    changed = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for module in changed:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in changed:
            module.track_running_stats = True
