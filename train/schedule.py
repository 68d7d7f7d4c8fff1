"""Learning rate and momentum: phases in a row, each a pure function of the step, but for the plateau.

The plateau follows the validation loss; what it remembers is in the checkpoint. It starts at a rate and
momentum of its own, because a finished cycle leaves next to no rate behind.

Example:
    >>> schedule = Schedule(recipe.schedule, recipe.optimizer, num_steps_per_epoch=56)
    >>> schedule.begin_step(optimizer, step)      # before each step
    >>> schedule.end_epoch(validation_loss, step)    # after each validation
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from train.config import OneCyclePhase, OptimizerSection, PlateauPhase, ScheduleSection
from train.optim import set_learning_rate


@dataclass(frozen=True)
class Span:
    """A phase and its steps, [first_step, end_step)."""

    phase: OneCyclePhase | PlateauPhase
    first_step: int
    end_step: int


def one_cycle(
    step: int, num_steps: int, peak_lr: float, momentum: float, phase: OneCyclePhase
) -> tuple[float, float | None]:
    """Rate and momentum (None: as it is) at `step` of a cycle of `num_steps`.

    Cosine up to `peak_lr` during `warmup_fraction` of the steps, cosine down to the end; momentum runs
    opposite. Equals torch's OneCycleLR with two phases (Smith & Topin, 2019).
    """
    last_warmup_step = phase.warmup_fraction * num_steps - 1
    low, high = phase.initial_lr_fraction * peak_lr, peak_lr
    final = phase.final_lr_fraction * peak_lr
    least = momentum if phase.min_momentum is None else min(phase.min_momentum, momentum)
    if step <= last_warmup_step:
        fraction = step / last_warmup_step if last_warmup_step > 0 else 1.0
        rate, moment = _cosine(low, high, fraction), _cosine(momentum, least, fraction)
    else:
        fraction = min(1.0, (step - last_warmup_step) / max(num_steps - 1 - last_warmup_step, 1e-9))
        rate, moment = _cosine(high, final, fraction), _cosine(least, momentum, fraction)
    return rate, None if phase.min_momentum is None else moment


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


class Schedule:
    """The schedule of a run.

    Args:
        peak_lr: what the fractions refer to; by default the optimizer's.
    """

    def __init__(
        self,
        config: ScheduleSection,
        optimizer_config: OptimizerSection,
        num_steps_per_epoch: int,
        peak_lr: float | None = None,
    ) -> None:
        self.peak_lr = optimizer_config.peak_lr if peak_lr is None else peak_lr
        self._momentum = optimizer_config.momentum
        self.spans: list[Span] = []
        epochs = 0.0
        for phase in config.phases:
            first = round(epochs * num_steps_per_epoch)
            epochs += phase.epochs
            self.spans.append(Span(phase, first, round(epochs * num_steps_per_epoch)))
        self.num_steps = self.spans[-1].end_step
        self._plateau: ReduceLROnPlateau | None = None
        self._plateau_first_step: int | None = None

    def span_at(self, step: int) -> Span:
        return next((span for span in self.spans if step < span.end_step), self.spans[-1])

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set rate and momentum for `step` (0-based); returns the rate."""
        span = self.span_at(step)
        if isinstance(span.phase, PlateauPhase):
            if self._plateau_first_step != span.first_step:
                self._start_plateau(optimizer, span)
        else:
            rate, momentum = one_cycle(
                step - span.first_step,
                span.end_step - span.first_step,
                self.peak_lr,
                self._momentum,
                span.phase,
            )
            set_learning_rate(optimizer, rate, momentum)
        return optimizer.param_groups[0]["lr"]

    def _start_plateau(self, optimizer: torch.optim.Optimizer, span: Span) -> None:
        phase = span.phase
        assert isinstance(phase, PlateauPhase)
        momentum = self._momentum if phase.momentum is None else phase.momentum
        set_learning_rate(optimizer, phase.initial_lr_fraction * self.peak_lr, momentum)
        self._plateau = self._build_plateau(optimizer, phase)
        self._plateau_first_step = span.first_step

    def _build_plateau(self, optimizer: torch.optim.Optimizer, phase: PlateauPhase) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(
            optimizer,
            factor=phase.factor,
            patience=phase.patience,
            threshold=phase.threshold,
            min_lr=phase.min_lr_fraction * self.peak_lr,
        )

    def end_epoch(self, validation_loss: float, steps_done: int) -> None:
        """Tell a plateau the validation loss after `steps_done` steps; equal on all ranks."""
        if self._plateau is not None and self._plateau_first_step is not None:
            span = self.span_at(self._plateau_first_step)
            if span.first_step < steps_done <= span.end_step:
                self._plateau.step(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"peak_lr": self.peak_lr, "plateau_first_step": self._plateau_first_step}
        if self._plateau is not None:
            remembered = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
            state["plateau"] = {name: getattr(self._plateau, name) for name in remembered}
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take up again; the plateau's current rate comes back with the optimizer's own state."""
        self.peak_lr = state["peak_lr"]
        self._plateau_first_step = state["plateau_first_step"]
        if "plateau" in state and self._plateau_first_step is not None:
            phase = self.span_at(self._plateau_first_step).phase
            assert isinstance(phase, PlateauPhase)
            self._plateau = self._build_plateau(optimizer, phase)
            for name, value in state["plateau"].items():
                setattr(self._plateau, name, value)
