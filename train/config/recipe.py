"""The whole recipe: its sections, and what only all of them together can have wrong."""

from __future__ import annotations

from pydantic import model_validator

from train.config.schedule import ScheduleSection
from train.config.sections import (
    AugmentationSection,
    BudgetSection,
    CheckpointSection,
    DataSection,
    EmaSection,
    LossSection,
    LrFinderSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    PreemptionSection,
    ProfileSection,
    RunSection,
    Section,
    TrackingSection,
    ValidationSection,
)


class Recipe(Section):
    """A complete recipe."""

    expected: str = ""  # what comes out, on which hardware, in what time; for people
    run: RunSection = RunSection()
    data: DataSection
    augmentation: AugmentationSection = AugmentationSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection | None = None
    lr_finder: LrFinderSection = LrFinderSection()
    validation: ValidationSection = ValidationSection()
    precision: PrecisionSection = PrecisionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    preemption: PreemptionSection = PreemptionSection()
    tracking: TrackingSection = TrackingSection()
    budget: BudgetSection = BudgetSection()
    profile: ProfileSection | None = None

    @property
    def num_epochs(self) -> int:
        return int(self.schedule.epochs)

    @property
    def validation_resolution(self) -> int:
        """Side in pixels; if not set, the resolution that training ends with."""
        return self.validation.resolution or self.data.resolution_at(self.num_epochs)

    @property
    def headline_weights(self) -> str:
        """`model`, or `ema`: the average of the weights, of which the headline and the exports speak."""
        return self.validation.weights or ("model" if self.ema is None else "ema")

    @property
    def weights_at_start(self) -> str:
        """What is wished for: `random`, `pretrained`, `pretrained if available`, or `checkpoint`.

        What a run really began with is in its checkpoint and in summary.json.
        """
        if self.model.checkpoint is not None:
            return "checkpoint"
        if self.model.pretrained == "if_available":
            return "pretrained if available"
        return "pretrained" if self.model.pretrained else "random"

    @model_validator(mode="after")
    def _reaches_resolutions(self) -> Recipe:
        late = [start for start in self.data.resolutions if start >= self.num_epochs]
        if late:
            raise ValueError(
                f"data.resolution: epoch {late[0]} never comes, the schedule has {self.num_epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _has_average(self) -> Recipe:
        wanted = [self.validation.weights, *(view.weights for view in self.validation.views.values())]
        if self.ema is None and "ema" in wanted:
            raise ValueError("validation: weights: ema needs a section ema, e.g. ema: {decay: 0.9999}")
        return self
