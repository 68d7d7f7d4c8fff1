"""The recipe: frozen models with strict keys, every fault reported at once, before a GPU is touched.

A recipe is one YAML file; `section.key=value` on the command line overrides it. `data.path` is the only key
without a default.

Example:
    >>> recipe = load_recipe(Path("configs/demo.yaml"), ["data.path=data/intel", "optimizer.peak_lr=0.1"])
    >>> recipe.optimizer.peak_lr
    0.1
"""

from train.config.reading import RecipeError, dump_recipe, flatten, load_recipe, parse_recipe
from train.config.recipe import Recipe
from train.config.schedule import (
    AnyPhase,
    ConstantPhase,
    CosinePhase,
    CyclicPhase,
    EarlyStoppingSection,
    LinearPhase,
    MultiStepPhase,
    OneCyclePhase,
    Phase,
    PlateauPhase,
    ScheduleSection,
    StepPhase,
)
from train.config.sections import (
    AugmentationSection,
    BudgetSection,
    CheckpointSection,
    ClipSection,
    DataSection,
    DistillationSection,
    EmaSection,
    HeadSection,
    LossSection,
    LossSpikeSection,
    LrFinderSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    PreemptionSection,
    ProfileSection,
    RandAugmentSection,
    RunSection,
    SamSection,
    Section,
    TrackingSection,
    ValidationSection,
    ViewSection,
)

__all__ = [
    "AnyPhase",
    "AugmentationSection",
    "BudgetSection",
    "CheckpointSection",
    "ClipSection",
    "ConstantPhase",
    "CosinePhase",
    "CyclicPhase",
    "DataSection",
    "DistillationSection",
    "EarlyStoppingSection",
    "EmaSection",
    "HeadSection",
    "LinearPhase",
    "LossSection",
    "LossSpikeSection",
    "LrFinderSection",
    "ModelSection",
    "MultiStepPhase",
    "OneCyclePhase",
    "OptimizerSection",
    "Phase",
    "PlateauPhase",
    "PrecisionSection",
    "PreemptionSection",
    "ProfileSection",
    "RandAugmentSection",
    "Recipe",
    "RecipeError",
    "RunSection",
    "SamSection",
    "ScheduleSection",
    "Section",
    "StepPhase",
    "TrackingSection",
    "ValidationSection",
    "ViewSection",
    "dump_recipe",
    "flatten",
    "load_recipe",
    "parse_recipe",
]
