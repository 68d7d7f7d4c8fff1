"""Learning rate and momentum: phases in a row, each a pure function of the step, but for the plateau.

The plateau follows the validation loss; what it remembers is in the checkpoint. Each phase sets its own rate
and momentum, because a finished cycle leaves next to no rate behind.

A run may be shortened on its way: what is left of the schedule then passes proportionally faster, and ends
where the whole one would have ended. What the phases see is therefore a virtual step, which is the real one
until then.

Example:
    >>> schedule = Schedule(recipe.schedule, recipe.optimizer, num_steps_per_epoch=56)
    >>> schedule.begin_step(optimizer, step)      # before each step
    >>> schedule.end_epoch(validation_loss, step)    # after each validation
    >>> schedule.shorten(at_step=step, num_steps=step + 560)    # ten more epochs, annealed to the end

    python -m train.schedule configs/demo.yaml --out schedule.png    # a picture and a table of it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from train.config import (
    AnyPhase,
    ConstantPhase,
    CosinePhase,
    CyclicPhase,
    EarlyStoppingSection,
    LinearPhase,
    MultiStepPhase,
    OneCyclePhase,
    OptimizerSection,
    PlateauPhase,
    ScheduleSection,
    StepPhase,
)
from train.optim import set_learning_rate

WarmPhase = ConstantPhase | StepPhase | MultiStepPhase | CosinePhase | LinearPhase


@dataclass(frozen=True)
class Span:
    """A phase and its virtual steps, [first_step, end_step)."""

    phase: AnyPhase
    first_step: int
    end_step: int


def one_cycle(
    step: float, num_steps: int, peak_lr: float, momentum: float, phase: OneCyclePhase
) -> tuple[float, float]:
    """Rate and momentum at `step` of a cycle of `num_steps`.

    Cosine up to `peak_lr` during `warmup_fraction` of the steps, cosine down to the end; momentum runs
    opposite. Equals torch's OneCycleLR with two phases (Smith & Topin, 2019).
    """
    last_warmup_step = phase.warmup_fraction * num_steps - 1
    low, high = phase.initial_lr_fraction * peak_lr, peak_lr
    final = phase.final_lr_fraction * peak_lr
    least = momentum if phase.min_momentum is None else min(phase.min_momentum, momentum)
    if step <= last_warmup_step:
        fraction = step / last_warmup_step if last_warmup_step > 0 else 1.0
        return _cosine(low, high, fraction), _cosine(momentum, least, fraction)
    fraction = min(1.0, (step - last_warmup_step) / max(num_steps - 1 - last_warmup_step, 1e-9))
    return _cosine(high, final, fraction), _cosine(least, momentum, fraction)


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def cyclic(step: float, steps_per_epoch: int, phase: CyclicPhase) -> float:
    """Fraction of the phase's peak: triangles of `cycle_epochs`, each `cycle_factor` as high as the last.

    Equals torch's CyclicLR (Smith, 2017), whose `triangular2` has a `cycle_factor` of 0.5.
    """
    cycle, fraction = divmod(step / (phase.cycle_epochs * steps_per_epoch), 1.0)
    height = (1 - abs(2 * fraction - 1)) * phase.cycle_factor**cycle
    return phase.min_lr_fraction + (1 - phase.min_lr_fraction) * height


def warm_phase(step: float, num_steps: int, steps_per_epoch: int, phase: WarmPhase) -> float:
    """Fraction of the phase's peak at `step` of its `num_steps`: a linear warm-up, then the phase's curve.

    The warm-up reaches what the curve has at its end. Steps down are counted from the begin of the phase;
    cosine and line are stretched over what the warm-up leaves, as torch's CosineAnnealingLR and LinearLR.
    """
    warmup_steps = phase.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        start, end = phase.warmup_lr_fraction, _curve(warmup_steps, num_steps, steps_per_epoch, phase)
        return start + (end - start) * step / warmup_steps
    return _curve(step, num_steps, steps_per_epoch, phase)


def _curve(step: float, num_steps: int, steps_per_epoch: int, phase: WarmPhase) -> float:
    # Epochs may be fractions: 0.3 epochs of 10 steps are 3 steps, which floating point would miss by 4e-16.
    epoch = (step + 1e-6) / steps_per_epoch
    if isinstance(phase, StepPhase):
        return phase.factor ** math.floor(epoch / phase.every_epochs)
    if isinstance(phase, MultiStepPhase):
        return phase.factor ** sum(at <= epoch for at in phase.at_epochs)
    warmup_steps = phase.warmup_epochs * steps_per_epoch
    fraction = min(1.0, (step - warmup_steps) / max(num_steps - warmup_steps, 1e-9))
    if isinstance(phase, CosinePhase):
        return _cosine(1.0, phase.final_lr_fraction, fraction)
    if isinstance(phase, LinearPhase):
        return phase.initial_lr_fraction + (phase.final_lr_fraction - phase.initial_lr_fraction) * fraction
    return 1.0


class Plateau:
    """Cuts the rate when the validation loss stops falling; equals torch's ReduceLROnPlateau.

    It holds the rate itself, not the optimizer: so rates of groups keep their ratios however small they get.

    Attributes:
        rate: the base rate. best, num_bad: the least loss, and the validations since without a better one.
    """

    def __init__(self, phase: PlateauPhase, peak_lr: float) -> None:
        self._phase = phase
        self._least_rate = phase.min_lr_fraction * phase.lr_fraction * peak_lr
        self.rate = phase.initial_lr_fraction * phase.lr_fraction * peak_lr
        self.best, self.num_bad = math.inf, 0

    def update(self, loss: float) -> None:
        """Take note of a validation loss; one that is not a number is no improvement."""
        if loss < self.best * (1 - self._phase.threshold):
            self.best, self.num_bad = loss, 0
            return
        self.num_bad += 1
        if self.num_bad > self._phase.patience:
            # The least rate is where cuts end; a rate that begins below it stays.
            self.rate = max(self.rate * self._phase.factor, min(self.rate, self._least_rate))
            self.num_bad = 0


class Schedule:
    """The schedule of a run.

    Args:
        peak_lr: what the fractions refer to; by default the optimizer's.

    Attributes:
        num_steps: of the run, fewer after `shorten`.
        spans: the phases with their virtual steps.
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
        self._steps_per_epoch = num_steps_per_epoch
        self.spans: list[Span] = []
        epochs = 0.0
        for phase in config.phases:
            first = round(epochs * num_steps_per_epoch)
            epochs += phase.epochs
            self.spans.append(Span(phase, first, round(epochs * num_steps_per_epoch)))
        self.num_steps = self._full_steps = self.spans[-1].end_step
        self._cuts: list[tuple[int, int]] = []  # (at_step, num_steps) of each shortening
        self._plateau: Plateau | None = None
        self._plateau_first_step: int | None = None

    def shorten(self, at_step: int, num_steps: int) -> None:
        """From `at_step` on, pass through the rest of the schedule faster, to end after `num_steps` in all.

        All ranks must call it alike. The last step is the last of the whole schedule, so that rates are
        annealed to their end; a plateau's epochs become fewer, not its patience.

        Raises:
            ValueError: nothing would be left, it would grow longer, or it goes back behind an earlier one.
        """
        earliest = self._cuts[-1][0] if self._cuts else 0
        if not max(earliest, 0) <= at_step < num_steps <= self.num_steps:
            raise ValueError(
                f"a schedule of {self.num_steps} steps cannot be shortened at step {at_step} to {num_steps}"
            )
        self._cuts.append((at_step, num_steps))
        self.num_steps = num_steps

    def restore_length(self) -> None:
        """Take shortenings back: the rest is passed through at its own pace again."""
        self._cuts.clear()
        self.num_steps = self._full_steps

    def virtual_step(self, step: int) -> float:
        """Where in the whole schedule `step` is; itself until a shortening."""
        last = self._full_steps - 1
        begin, position, end = 0, 0.0, last
        for at_step, num_steps in self._cuts:
            if step < at_step:
                break
            position += (at_step - begin) * (last - position) / (end - begin) if end > begin else 0.0
            begin, end = at_step, num_steps - 1
        if step >= end:
            return last
        return position + (step - begin) * (last - position) / (end - begin)

    def span_at(self, step: int) -> Span:
        """The phase of a step; of the last one after the end."""
        position = self.virtual_step(step)
        return next((span for span in self.spans if position < span.end_step), self.spans[-1])

    def trainable_at(self, step: int) -> str | tuple[str, ...]:
        """What learns in this step: "all", "head", or names of modules; see `set_trainable`."""
        return self.span_at(step).phase.trainable

    def rate_at(self, step: int) -> tuple[float, float]:
        """Base rate and momentum of a step; of a plateau, the rate that it has now or begins with."""
        span = self.span_at(step)
        phase, position = span.phase, self.virtual_step(step) - span.first_step
        momentum = self._momentum if phase.momentum is None else phase.momentum
        peak, num_steps = phase.lr_fraction * self.peak_lr, span.end_step - span.first_step
        if isinstance(phase, PlateauPhase):
            plateau = self._plateau if self._plateau_first_step == span.first_step else None
            return (plateau or Plateau(phase, self.peak_lr)).rate, momentum
        if isinstance(phase, OneCyclePhase):
            return one_cycle(position, num_steps, peak, momentum, phase)
        if isinstance(phase, CyclicPhase):
            return peak * cyclic(position, self._steps_per_epoch, phase), momentum
        return peak * warm_phase(position, num_steps, self._steps_per_epoch, phase), momentum

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set rate and momentum for `step` (0-based); returns the base rate, that of the head."""
        span = self.span_at(step)
        if isinstance(span.phase, PlateauPhase) and self._plateau_first_step != span.first_step:
            self._plateau = Plateau(span.phase, self.peak_lr)
            self._plateau_first_step = span.first_step
        rate, momentum = self.rate_at(step)
        set_learning_rate(optimizer, rate, momentum)
        return rate

    def end_epoch(self, validation_loss: float, steps_done: int) -> None:
        """Tell a plateau the validation loss after `steps_done` steps; equal on all ranks."""
        if self._plateau is not None and self._plateau_first_step == self.span_at(steps_done - 1).first_step:
            self._plateau.update(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "peak_lr": self.peak_lr,
            "cuts": [list(cut) for cut in self._cuts],
            "plateau_first_step": self._plateau_first_step,
        }
        if self._plateau is not None:
            state["plateau"] = {name: getattr(self._plateau, name) for name in ("rate", "best", "num_bad")}
        return state

    def load_state_dict(self, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take up again; the optimizer gets its rate with the next `begin_step`, and is not needed here."""
        self.peak_lr = state["peak_lr"]
        self._cuts = [(at_step, num_steps) for at_step, num_steps in state["cuts"]]
        self.num_steps = self._cuts[-1][1] if self._cuts else self._full_steps
        self._plateau, self._plateau_first_step = None, state["plateau_first_step"]
        for span in self.spans:
            if isinstance(span.phase, PlateauPhase) and span.first_step == self._plateau_first_step:
                self._plateau = Plateau(span.phase, self.peak_lr)
                for name, value in state["plateau"].items():
                    setattr(self._plateau, name, value)


class EarlyStopping:
    """Says when the headline has not improved for `patience` validations; remembers over a restart."""

    def __init__(self, config: EarlyStoppingSection) -> None:
        self._config = config
        self.best: float | None = None
        self.num_bad = 0

    def update(self, top1: float, loss: float) -> bool:
        """Take note of a validation, equal on all ranks; true where the run is to stop.

        A loss that is not finite is no improvement, whatever the metric.
        """
        value = top1 if self._config.metric == "top1" else -loss
        is_better = self.best is None or value > self.best + self._config.min_delta
        if is_better and math.isfinite(loss) and math.isfinite(top1):
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1
        return self.num_bad >= self._config.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.num_bad = state["best"], state["num_bad"]


if __name__ == "__main__":
    from train.schedule_plot import main

    raise SystemExit(main())
