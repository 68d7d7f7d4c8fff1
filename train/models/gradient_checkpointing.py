"""Gradient checkpointing: a block keeps its input alone and runs a second time in the backward pass
(Chen et al., 2016). Less memory, about a third more time, the same gradients.

One way for all libraries. timm's own switch lets every BatchNorm count a batch twice, in the first run and in
the second; here the second run leaves running statistics alone.

Example:
    >>> checkpoint_blocks(model)
    16
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from train.models.specialize import specialize


def checkpoint_blocks(model: nn.Module) -> int:
    """Checkpoint every block of the model in training; how many there are. State dict keys stay.

    Raises:
        ValueError: the model is not made of blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"model.gradient_checkpointing: {type(model).__name__} is not made of blocks that could be run "
            "again; set it to false"
        )
    for block in blocks:
        specialize(block, _Checkpointed)
    return len(blocks)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of a kind that occurs repeatedly, stages of such blocks not counted."""
    counts = Counter(type(module) for module in model.modules())
    stages = {type(module) for module in model.modules() if _is_stage(module)}

    def walk(parent: nn.Module) -> Iterator[nn.Module]:
        for child in parent.children():
            if counts[type(child)] > 1 and type(child) not in stages and _is_composed(child):
                yield child
            else:
                yield from walk(child)

    return list(walk(model))


def _is_composed(module: nn.Module) -> bool:
    """Made by a library of two layers or more: to keep only its input saves something."""
    layers = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return not type(module).__module__.startswith("torch.nn.") and len(layers) > 1


def _is_stage(module: nn.Module) -> bool:
    """Holds a list of equal blocks, each of several matrices; convolutions with their norms are no blocks."""
    for part in module.modules():
        if isinstance(part, nn.Sequential | nn.ModuleList) and len(part) > 1:
            equal = len({type(child) for child in part}) == 1
            matrices = [m for m in part[0].modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            if equal and _is_composed(part[0]) and len(matrices) > 1:
                return True
    return False


class _Checkpointed(nn.Module):
    """A block that runs again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return run(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler runs again only what has no side effect
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            preserve_rng_state=True,  # dropout and stochastic depth draw the same again
            context_fn=lambda: (nullcontext(), _without_statistics(self)),
            **kwargs,
        )


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorms do all that they did in the first run, but leave their running statistics as they are."""
    norms: list[Any] = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()  # the copy counts
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
