"""The schedule section: phases in a row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from train.config.sections import Section


class _Phase(Section):
    """What all phases have."""

    epochs: float = Field(gt=0)
    lr_fraction: float = Field(default=1.0, gt=0)  # of peak_lr: what the fractions of this phase refer to
    momentum: float | None = Field(default=None, ge=0, lt=1)  # null: optimizer.momentum
    # head: the rest is frozen, its BatchNorm statistics too; or names of modules, e.g. [layer4, fc]
    trainable: Literal["all", "head"] | tuple[str, ...] = "all"


class _WarmPhase(_Phase):
    """A phase that may begin with a linear warm-up, as part of its epochs."""

    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr_fraction: float = Field(default=0.0, ge=0, le=1)  # where the warm-up begins

    @model_validator(mode="after")
    def _warm_in_time(self) -> _WarmPhase:
        if self.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs must be fewer than the epochs of the phase")
        return self


class ConstantPhase(_WarmPhase):
    """One rate."""

    kind: Literal["constant"] = "constant"


class StepPhase(_WarmPhase):
    """Times `factor` every `every_epochs`."""

    kind: Literal["step"] = "step"
    every_epochs: float = Field(gt=0)
    factor: float = Field(default=0.1, gt=0, lt=1)


class MultiStepPhase(_WarmPhase):
    """Times `factor` at each of `at_epochs`, counted from the begin of the phase."""

    kind: Literal["multi_step"] = "multi_step"
    at_epochs: tuple[float, ...] = Field(min_length=1)
    factor: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _within(self) -> MultiStepPhase:
        if list(self.at_epochs) != sorted(set(self.at_epochs)) or not self.at_epochs[0] > 0:
            raise ValueError("at_epochs must rise, from above 0")
        if self.at_epochs[-1] >= self.epochs:
            raise ValueError(f"at_epochs must lie within the phase's {self.epochs:g} epochs")
        return self


class CosinePhase(_WarmPhase):
    """A half cosine down to `final_lr_fraction` (Loshchilov & Hutter, 2017)."""

    kind: Literal["cosine"] = "cosine"
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)


class LinearPhase(_WarmPhase):
    """A straight line from `initial_lr_fraction` to `final_lr_fraction`, up or down."""

    kind: Literal["linear"] = "linear"
    initial_lr_fraction: float = Field(default=1.0, ge=0, le=1)
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)


class OneCyclePhase(_Phase):
    """Up to `peak_lr` and down again, cosine both ways; momentum runs opposite (Smith & Topin, 2019)."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)
    initial_lr_fraction: float = Field(default=1 / 25, gt=0, le=1)  # of peak_lr
    final_lr_fraction: float = Field(default=1 / 25e4, ge=0, le=1)  # of peak_lr
    min_momentum: float | None = Field(default=0.85, ge=0, lt=1)  # at the peak; null: momentum stays


class CyclicPhase(_Phase):
    """Triangles between `min_lr_fraction` and the peak (Smith, 2017)."""

    kind: Literal["cyclic"] = "cyclic"
    cycle_epochs: float = Field(gt=0)  # up and down
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    cycle_factor: float = Field(default=1.0, gt=0, le=1)  # the height of a triangle beside that before it


class PlateauPhase(_Phase):
    """Cut the rate when the validation loss stops falling.

    Starts at its own rate and momentum: where the cycle ends, the rate is next to nothing.
    """

    kind: Literal["plateau"] = "plateau"
    initial_lr_fraction: float = Field(default=0.01, gt=0, le=1)  # of peak_lr
    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=0)  # epochs without improvement that are forgiven
    threshold: float = Field(default=1e-3, ge=0)  # relative improvement that counts
    min_lr_fraction: float = Field(default=1e-5, ge=0, le=1)  # of peak_lr


PurePhase = (
    ConstantPhase | StepPhase | MultiStepPhase | CosinePhase | LinearPhase | OneCyclePhase | CyclicPhase
)
AnyPhase = PurePhase | PlateauPhase
PHASE_KINDS: dict[str, type[_Phase]] = {
    "constant": ConstantPhase,
    "step": StepPhase,
    "multi_step": MultiStepPhase,
    "cosine": CosinePhase,
    "linear": LinearPhase,
    "one_cycle": OneCyclePhase,
    "cyclic": CyclicPhase,
    "plateau": PlateauPhase,
}
Phase = Annotated[AnyPhase, Field(discriminator="kind")]


class EarlyStoppingSection(Section):
    """End the run, finished, when the headline has not improved for `patience` validations."""

    metric: Literal["top1", "loss"] = "top1"
    patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=0.0, ge=0)  # an improvement by less does not count


class ScheduleSection(Section):
    """Phases in a row; a pure function of the step, but for the plateau."""

    phases: tuple[Phase, ...] = Field(default=(OneCyclePhase(epochs=16),), min_length=1)
    early_stopping: EarlyStoppingSection | None = None

    @property
    def epochs(self) -> float:
        return sum(phase.epochs for phase in self.phases)

    @model_validator(mode="after")
    def _whole_epochs(self) -> ScheduleSection:
        if any(phase.kind == "plateau" and not float(phase.epochs).is_integer() for phase in self.phases):
            raise ValueError("a plateau phase looks at whole epochs: give it a whole number of them")
        if not float(self.epochs).is_integer():
            raise ValueError("the phases together must make a whole number of epochs")
        return self
