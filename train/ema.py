"""Exponential moving average of a model's weights, with warm-up.

    average ← decay · average + (1 − decay) · weights

BatchNorm statistics are averaged by the same rule. Each rank has its own ones while it trains, and averaging
them over ranks afterwards (`Ranks.average_buffers`) is the same as doing so in every step, since both are
linear; so nothing travels in a step.

Example:
    >>> ema = Ema(model, recipe.ema)
    >>> ema.update(step)      # after each step
    >>> validate(ema.model, …)
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from train.config import EmaSection


class Ema:
    """The average of one model.

    Attributes:
        model: a copy in evaluation mode that holds the average.
        num_updates: how often it was updated.
    """

    def __init__(self, model: nn.Module, config: EmaSection) -> None:
        self._config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.num_updates = 0
        # Listed once: walking through a model's modules takes longer than the update itself.
        self._own, self._watched = self._tensors(self.model), self._tensors(model)

    def update(self, steps_done: int) -> None:
        """Take in the model's weights after `steps_done` steps; does nothing between two `every_steps`."""
        if steps_done % self._config.every_steps:
            return
        decay = decay_at(self._config, self.num_updates)
        self.num_updates += 1
        torch._foreach_lerp_(self._own[0], self._watched[0], 1 - decay)
        if self._own[1]:
            torch._foreach_copy_(self._own[1], self._watched[1])

    @staticmethod
    def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is averaged, and counters, which are not."""
        tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        return floats, [tensor for tensor in tensors if not tensor.is_floating_point()]


def decay_at(config: EmaSection, num_updates: int) -> float:
    """Decay of the update after `num_updates` others.

    With warm-up at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage: an average that
    began at random weights would carry them along for 1 / (1 − decay) steps.
    """
    decay = config.decay**config.every_steps
    return min(decay, (1 + num_updates) / (10 + num_updates)) if config.warmup else decay
