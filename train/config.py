"""The recipe: frozen models with strict keys, every fault reported at once, before a GPU is touched.

A recipe is one YAML file; `section.key=value` on the command line overrides it. `data.path` is the only key
without a default.

Example:
    >>> recipe = load_recipe(Path("configs/demo.yaml"), ["data.path=data/intel", "optimizer.peak_lr=0.1"])
    >>> recipe.optimizer.peak_lr
    0.1
"""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

MAX_RECIPE_BYTES = 1 << 20


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives and how often it speaks."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # null: the recipe's name
    folder: Path = Path("runs")
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every_steps: int = Field(default=20, ge=1)
    preflight: bool = (
        True  # measure loader and model for two seconds at the start, and say which is the limit
    )


def _check_resolution(value: Any) -> int | dict[int, int]:
    """A side in pixels, or a mapping from the epoch it begins with; one sentence for all that is wrong."""
    if isinstance(value, dict):
        # Keys are strings where they come from JSON.
        starts = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}
        if 0 not in starts or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in starts):
            raise ValueError(f"must name epochs counted from 0, and begin with 0 (given: {value})")
        return {start: _check_side(starts[start]) for start in sorted(starts)}
    return _check_side(value)


def _check_side(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 8 <= value <= 2048:
        raise ValueError(
            "must be a number of pixels from 8 to 2048, or a mapping such as {0: 128, 10: 160} from "
            "the epoch it begins with"
        )
    return value


Resolution = Annotated[
    int | dict[int, int], PlainValidator(_check_resolution), PlainSerializer(lambda value: value)
]


def _check_path(value: Any) -> Path | str:
    """A folder, or `s3://bucket/prefix`, which as a Path would lose a slash."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be a folder or s3://bucket/prefix")
    return str(value) if str(value).startswith("s3://") else Path(value)


DataPath = Annotated[Path | str, PlainValidator(_check_path), PlainSerializer(str)]


class DataSection(Section):
    """Which images, how many a step, and how they are cropped."""

    path: DataPath
    stage_folder: Path = Path("data/staged")  # where a data set in S3 is copied to, on this machine's disk
    loader: Literal["auto", "ffcv", "dali", "reference"] = "auto"
    num_workers: int | None = Field(default=None, ge=0)  # a rank; null: its share of the machine's cores
    check_bytes: Literal["first_epoch", "every_epoch", "never"] = "first_epoch"  # against their CRC-32C
    max_damaged_fraction: float = Field(default=0.001, ge=0, le=1)  # of the split; more ends the run
    timeout_seconds: float = Field(default=300, gt=0)  # without any batch
    global_batch_size: int = Field(default=256, ge=1)
    grad_accum_steps: int = Field(default=1, ge=1)
    resolution: Resolution = 224  # pixels; or {0: 128, 10: 160}: from that epoch (counted from 0) on
    crop_scale: tuple[float, float] = (0.35, 1.0)  # of the area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    horizontal_flip: bool = True
    normalization: Literal["dataset", "imagenet", "unit"] = "dataset"

    @property
    def name(self) -> str:
        """The last part of the data set's folder or prefix."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    @property
    def resolutions(self) -> dict[int, int]:
        """Epoch → the resolution that training has from there on, in pixels."""
        return self.resolution if isinstance(self.resolution, dict) else {0: self.resolution}

    def resolution_at(self, epoch: int) -> int:
        """Training resolution of an epoch, counted from 0, in pixels."""
        return [side for start, side in self.resolutions.items() if start <= epoch][-1]

    @model_validator(mode="after")
    def _ranges(self) -> DataSection:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("crop_scale must be two fractions, 0 < low <= high <= 1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ValueError("crop_aspect must be two positive numbers, low <= high")
        return self


class ModelSection(Section):
    """A timm or torchvision classifier by name."""

    library: Literal["timm", "torchvision"] = "timm"
    name: str = "resnet50"
    pretrained: bool = False
    channels_last: bool = True


class OptimizerSection(Section):
    """SGD with momentum, or AdamW. Norms and biases are never decayed."""

    name: Literal["sgd", "adamw"] = "sgd"
    peak_lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # for AdamW: beta1
    nesterov: bool = False
    weight_decay: float = Field(default=1e-4, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class OneCyclePhase(Section):
    """Up to `peak_lr` and down again, cosine both ways; momentum runs opposite (Smith & Topin, 2019)."""

    kind: Literal["one_cycle"] = "one_cycle"
    epochs: float = Field(gt=0)
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)
    initial_lr_fraction: float = Field(default=1 / 25, gt=0, le=1)  # of peak_lr
    final_lr_fraction: float = Field(default=1 / 25e4, ge=0, le=1)  # of peak_lr
    min_momentum: float | None = Field(default=0.85, ge=0, lt=1)  # at the peak; null: momentum stays


class PlateauPhase(Section):
    """Cut the rate when the validation loss stops falling.

    Starts at its own rate and momentum: where the cycle ends, the rate is next to nothing.
    """

    kind: Literal["plateau"] = "plateau"
    epochs: float = Field(gt=0)
    initial_lr_fraction: float = Field(default=0.01, gt=0, le=1)  # of peak_lr
    momentum: float | None = Field(default=None, ge=0, lt=1)  # null: optimizer.momentum
    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=0)  # epochs without improvement that are forgiven
    threshold: float = Field(default=1e-3, ge=0)  # relative improvement that counts
    min_lr_fraction: float = Field(default=1e-5, ge=0, le=1)  # of peak_lr


Phase = Annotated[OneCyclePhase | PlateauPhase, Field(discriminator="kind")]


class ScheduleSection(Section):
    """Phases in a row; a pure function of the step, but for the plateau."""

    phases: tuple[Phase, ...] = Field(default=(OneCyclePhase(epochs=16),), min_length=1)

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


class LrFinderSection(Section):
    """Learning-rate range test before the first step (Smith, 2017), on torch-lr-finder."""

    enabled: bool = False
    use: bool = False  # train with the rate it chooses in place of optimizer.peak_lr
    start_lr: float = Field(default=1e-4, gt=0)
    end_lr: float = Field(default=3.0, gt=0)
    num_steps: int = Field(default=60, ge=20)
    fraction_of_minimum: float = Field(default=1.0, gt=0, le=1)  # 0.1 for a constant rate without warm-up

    @model_validator(mode="after")
    def _order(self) -> LrFinderSection:
        if self.start_lr >= self.end_lr:
            raise ValueError("start_lr must be below end_lr")
        if self.use and not self.enabled:
            raise ValueError("use: true needs enabled: true")
        return self


class ValidationSection(Section):
    """How the validation split is looked at: a centre crop of `crop_ratio` of the shorter side."""

    every_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)  # of every rank; the counts do not depend on it
    resolution: int | None = Field(default=None, ge=8, le=2048)  # null: the training resolution
    crop_ratio: float = Field(default=0.875, gt=0, le=1)


class PrecisionSection(Section):
    """Arithmetic of the forward and backward pass; weights stay in fp32."""

    mode: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware has it


class CheckpointSection(Section):
    """Which checkpoints are kept besides `best` and the last."""

    keep_last: int = Field(default=2, ge=1)


class TrackingSection(Section):
    """MLflow. metrics.jsonl is always written."""

    mlflow: bool = True
    uri: str | None = None  # null: sqlite in run.folder
    experiment: str = "imagenet-sprint"


class BudgetSection(Section):
    """What an hour costs; see train/prices.yaml."""

    usd_per_hour: float | None = Field(default=None, ge=0)
    instance_type: str | None = "g6.12xlarge"


class Recipe(Section):
    """A complete recipe."""

    expected: str = ""  # what comes out, on which hardware, in what time; for people
    run: RunSection = RunSection()
    data: DataSection
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    lr_finder: LrFinderSection = LrFinderSection()
    validation: ValidationSection = ValidationSection()
    precision: PrecisionSection = PrecisionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    budget: BudgetSection = BudgetSection()

    @property
    def num_epochs(self) -> int:
        return int(self.schedule.epochs)

    @property
    def validation_resolution(self) -> int:
        """Side in pixels; if not set, the resolution that training ends with."""
        return self.validation.resolution or self.data.resolution_at(self.num_epochs)

    @model_validator(mode="after")
    def _reaches_resolutions(self) -> Recipe:
        late = [start for start in self.data.resolutions if start >= self.num_epochs]
        if late:
            raise ValueError(
                f"data.resolution: epoch {late[0]} never comes, the schedule has {self.num_epochs} epochs"
            )
        return self


class RecipeError(ValueError):
    """All faults of a recipe, a sentence each."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        super().__init__(f"{source} has {len(faults)} fault(s):\n" + "\n".join(f"  - {f}" for f in faults))


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply overrides, and check all of it.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the value is read as YAML, list members are named by ordinal
            (`schedule.phases.0.epochs=4`).

    Raises:
        RecipeError: with every fault found, each naming the nearest valid key.
    """
    tree = _read_yaml(path)
    faults = [fault for text in overrides or [] if (fault := _apply_override(tree, text))]
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [_sentence(fault) for fault in _innermost(error.errors())]
    if faults or recipe is None:
        raise RecipeError(str(path), faults)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"resolution": 64}}` → `{"data.resolution": 64}`; lists by ordinal."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(member, dict) for member in value):
            value = {str(position): member for position, member in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list as a key: refused below
            if key_node.value in seen:
                mark = key_node.start_mark
                raise yaml.MarkedYAMLError(problem=f"{key_node.value!r} stands twice", problem_mark=mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.yaml?" if near else ""
        raise RecipeError(str(path), [f"there is no such file{hint}"])
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(str(path), [f"larger than {MAX_RECIPE_BYTES >> 20} MiB: this is no recipe"])
    try:
        # A safe loader: a recipe may come from anybody, and YAML tags can construct objects.
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise RecipeError(
            str(path), [f"is no valid YAML{where}: {getattr(error, 'problem', error)}"]
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), ["is no recipe: expected sections such as data: and model:"])
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Set one value in place; returns a fault or None."""
    name, equals, raw = text.partition("=")
    if not equals or not name:
        return f"override {text!r} is not of the form section.key=value"
    try:
        value = yaml.load(raw, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        return f"override {text!r}: the value is no valid YAML"
    *parents, last = name.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part)
        if node is None:
            return f"override {text!r}: there is no {part!r} to go into"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"override {text!r}: the list has {len(node)} members, counted from 0"
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        child = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        return child if isinstance(child, dict | list) else None
    if node.get(part) is None:
        if part.isdigit():
            return None
        node[part] = {}
    child = node[part]
    return child if isinstance(child, dict | list) else None


def _innermost(faults: list[Any]) -> list[Any]:
    """Leave out faults that only follow from one inside them (a list is too short for its bad member)."""
    places = [tuple(fault["loc"]) for fault in faults]
    return [
        fault
        for fault, place in zip(faults, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _sentence(fault: Any) -> str:
    location = [part for part in fault["loc"] if part not in ("one_cycle", "plateau")]
    name = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"
        return f"{name}: unknown key; {hint}"
    if name == "data" and fault["type"] == "missing":
        return "data.path is missing: name the prepared folder, e.g. data.path=data/intel"
    if fault["type"] == "missing":
        example = ", e.g. data.path=data/intel" if name == "data.path" else ""
        return f"{name} is missing: set it in the recipe or on the command line{example}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = fault.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name or 'recipe'}: {message}{shown}"


def _valid_keys(location: list[Any]) -> list[str]:
    """The keys that the section at `location` knows."""
    model: type[BaseModel] = Recipe
    for part in location:
        if part == "phases" or isinstance(part, int):
            return sorted({*OneCyclePhase.model_fields, *PlateauPhase.model_fields})
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(model.model_fields)
        model = typing.cast(type[BaseModel], annotation)
    return list(model.model_fields)
