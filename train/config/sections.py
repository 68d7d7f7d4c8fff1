"""The sections of a recipe, but for the schedule: frozen, unknown keys refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from train.config.credentials import has_credentials


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
    if re.match(r"[A-Za-z0-9+.-]+://[^/]*@", str(value)):
        raise ValueError(
            "must not hold a password, which a run would store: set AWS_PROFILE or AWS_* variables"
        )
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
    # auto: as few as the largest micro-batch that fits into memory needs, found once at the start
    grad_accum_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    resolution: Resolution = 224  # pixels; or {0: 128, 10: 160}: from that epoch (counted from 0) on
    crop_scale: tuple[float, float] = (0.35, 1.0)  # of the area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    horizontal_flip: bool = True
    normalization: Literal["dataset", "imagenet", "unit"] = "dataset"
    # cross-validation: train on the train split without fold `fold`, and validate on that fold
    folds: int | None = Field(default=None, ge=2, le=1000)  # null: validate on the val split
    fold: int | None = Field(default=None, ge=0)  # 0 … folds - 1
    fold_seed: int = Field(default=0, ge=0, lt=2**32)  # of the assignment, equal for all folds

    @property
    def accum_steps(self) -> int:
        """Micro-batches a step; 1 as long as `auto` has not been resolved."""
        return 1 if self.grad_accum_steps == "auto" else self.grad_accum_steps

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

    @model_validator(mode="after")
    def _one_fold(self) -> DataSection:
        if self.folds is None and self.fold is not None:
            raise ValueError("fold needs data.folds, the number of folds, e.g. data.folds=5")
        if self.folds is not None and (self.fold is None or self.fold >= self.folds):
            raise ValueError(
                f"fold must be one of 0 … {self.folds - 1}, the fold that is held out "
                "(python -m evaluation kfold trains all of them)"
            )
        return self


class HeadSection(Section):
    """What stands between pooled features and classes: hidden layers, each with activation and dropout."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()  # widths, e.g. [512, 128]; empty: one linear layer
    activation: str = "relu"
    dropout: float = Field(default=0.0, ge=0, lt=1)  # before each linear layer


class ModelSection(Section):
    """A classifier of timm or torchvision by name, or the project's own, and what is changed in it."""

    library: Literal["timm", "torchvision", "own"] = "timm"
    name: str = "resnet50"  # own: residual_cnn
    options: dict[str, Any] = {}  # passed on to the library's constructor
    # weights from the library's hub; if_available: random ones where they cannot be had, and that is said
    pretrained: bool | Literal["if_available"] = False
    checkpoint: Path | None = None  # or weights from a file (.pt, .pth, .safetensors) or a run folder
    head: HeadSection | None = None  # null: the model's own
    activation: str | None = None  # in place of every activation, e.g. leaky_relu
    dropout: float = Field(default=0.0, ge=0, lt=1)  # before the last layer, where the model's own head stays
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)  # of the last block (Huang et al., 2016)
    blurpool: bool = False  # before strided convolutions with 16 input channels or more (Zhang, 2019)
    zero_init_last_norm: bool | None = None  # of each residual block; null: as the library does
    channels_last: bool = True
    sync_batchnorm: bool = False  # statistics over all ranks in every step
    gradient_checkpointing: bool = False  # less memory, about a third more time
    compile: bool | Literal["reduce-overhead", "max-autotune"] = False  # reduce-overhead: with CUDA graphs

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.pretrained is True and self.checkpoint is not None:
            raise ValueError("weights come from pretrained: true or from checkpoint, not from both")
        return self

    @property
    def asks_hub(self) -> bool:
        """Whether weights are wanted from the hub; a checkpoint goes before `if_available`."""
        return bool(self.pretrained) and self.checkpoint is None


class ClipSection(Section):
    """Gradient clipping: by total norm, by value, or adaptively by unit-wise norms (Brock et al., 2021)."""

    kind: Literal["norm", "value", "agc"] = "norm"
    limit: float = Field(gt=0)


class SamSection(Section):
    """Sharpness-aware minimization in every n-th step (Foret et al., 2021): that step costs twice as much."""

    every_steps: int = Field(default=10, ge=1)
    rho: float = Field(default=0.05, gt=0)


class LossSpikeSection(Section):
    """What is done about a step whose loss lies far above the last ones'."""

    action: Literal["report", "skip"] = "report"  # skip: weights and statistics stay as they were
    deviations: float = Field(default=8.0, gt=1)  # standard deviations above the moving average


class OptimizerSection(Section):
    """An optimizer by timm's name. Norms and biases are not decayed, found by the type of their module."""

    name: str = "sgd"
    peak_lr: float = Field(default=0.1, gt=0)
    # The global batch that peak_lr is meant for; another one scales it linearly. null: as it is.
    peak_lr_batch_size: int | None = Field(default=None, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # Adam and its kin: beta1
    nesterov: bool = False
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_norms_and_biases: bool = False
    options: dict[str, Any] = {}  # passed on to the optimizer, e.g. {eps: 1.0e-6}
    backbone_lr_fraction: float = Field(default=1.0, gt=0, le=1)  # of the head's rate
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # a factor a layer, from the head downwards
    clip: ClipSection | None = None
    sam: SamSection | None = None
    max_skipped_steps: int = Field(default=3, ge=0)  # in a row, for a non-finite loss or gradient
    loss_spike: LossSpikeSection = LossSpikeSection()

    @model_validator(mode="after")
    def _one_kind_of_groups(self) -> OptimizerSection:
        if self.backbone_lr_fraction != 1 and self.layer_decay != 1:
            raise ValueError("rates differ by backbone_lr_fraction or by layer_decay, not by both")
        return self


class DistillationSection(Section):
    """Knowledge distillation from a trained checkpoint (Hinton et al., 2015)."""

    teacher: Path  # a checkpoint or run folder with the same classes
    weight: float = Field(default=0.5, ge=0, le=1)  # of the teacher's part; the labels have the rest
    temperature: float = Field(default=2.0, gt=0)


class LossSection(Section):
    """What is minimized."""

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"  # bce: the head's bias starts at -log(classes)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # balanced: inversely to the images a class has, with mean 1 over images
    class_weights: Literal["balanced"] | tuple[Annotated[float, Field(ge=0)], ...] | None = None
    aux_weight: float = Field(default=0.4, ge=0)  # of auxiliary heads (Inception-v3, GoogLeNet)
    distillation: DistillationSection | None = None


class RandAugmentSection(Section):
    """`num_ops` operations an image at a magnitude from 0 to 30 (Cubuk et al., 2020)."""

    num_ops: int = Field(default=2, ge=1, le=14)
    magnitude: float = Field(default=9.0, ge=0, le=30)


class AugmentationSection(Section):
    """On the device, a different draw for each image, after crop and flip (section data)."""

    vertical_flip: bool = False
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)  # to both sides
    shear_degrees: float = Field(default=0.0, ge=0, lt=90)
    zoom: tuple[float, float] = (1.0, 1.0)  # factors, low and high
    translation: float = Field(default=0.0, ge=0, le=1)  # fraction of the side
    brightness: float = Field(default=0.0, ge=0, le=1)  # colour jitter: factors 1 ± this
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)  # of the colour circle
    rand_augment: RandAugmentSection | None = None
    trivial_augment: bool = False  # one operation at a random magnitude (Müller & Hutter, 2021)
    random_erasing: float = Field(default=0.0, ge=0, le=1)  # probability (Zhong et al., 2020)
    mixup: float = Field(default=0.0, ge=0)  # alpha of the beta distribution (Zhang et al., 2018)
    cutmix: float = Field(default=0.0, ge=0)  # alpha (Yun et al., 2019); with mixup: half of the images each
    mix_probability: float = Field(default=1.0, ge=0, le=1)  # share of the images that are mixed at all

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationSection:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError("zoom must be two factors, 0 < low <= high")
        if self.rand_augment is not None and self.trivial_augment:
            raise ValueError("rand_augment and trivial_augment are two policies: choose one")
        return self


class EmaSection(Section):
    """Exponential moving average of the weights, validated beside them or in their place."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    every_steps: int = Field(default=1, ge=1)  # decay is that of one step all the same
    warmup: bool = True  # decay is at most (1 + updates) / (10 + updates)


class LrFinderSection(Section):
    """Learning-rate range test before the first step (Smith, 2017), on torch-lr-finder."""

    enabled: bool = False
    use: bool = False  # train with the rate it chooses in place of optimizer.peak_lr
    start_lr: float = Field(default=1e-4, gt=0)
    end_lr: float = Field(default=3.0, gt=0)
    num_steps: int = Field(default=60, ge=20)
    # of the rate at which the smoothed loss is lowest: 1 suits a cycle, 0.1 a constant rate without warm-up
    fraction_of_minimum: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _order(self) -> LrFinderSection:
        if self.start_lr >= self.end_lr:
            raise ValueError("start_lr must be below end_lr")
        if self.use and not self.enabled:
            raise ValueError("use: true needs enabled: true")
        return self


class ViewSection(Section):
    """One way to look at the validation split, reported under its own name; null: as section validation."""

    resolution: int | None = Field(default=None, ge=8, le=2048)
    crop_ratio: float | None = Field(default=None, gt=0, le=1)
    flip_average: bool | None = None
    weights: Literal["model", "ema"] | None = None


class ValidationSection(Section):
    """How the validation split is looked at: a centre crop of `crop_ratio` of the shorter side.

    These settings make the headline; `views` are further ones, each validated and reported beside it.
    """

    every_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)  # of every rank; the counts do not depend on it
    resolution: int | None = Field(default=None, ge=8, le=2048)  # null: the training resolution
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    flip_average: bool = False  # mean of the logits of an image and its mirror image
    weights: Literal["model", "ema"] | None = None  # null: the average where there is one
    views: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ViewSection] = {}


class PrecisionSection(Section):
    """Arithmetic of the forward and backward pass; weights stay in fp32."""

    # auto: bf16 where the hardware has it; tf32: fp32 with products rounded to 10 bits
    mode: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"


class CheckpointSection(Section):
    """When checkpoints are written and which are kept; one at each epoch's end and each stop in any case."""

    keep_last: int = Field(default=2, ge=1)  # besides `best`
    every_minutes: float | None = Field(default=10.0, gt=0)  # within an epoch; null: not by time
    every_steps: int | None = Field(default=None, ge=1)  # within an epoch; null: not by steps
    mirror: str | None = None  # s3://bucket/prefix: a copy of each run there, in <prefix>/<run name>

    @model_validator(mode="after")
    def _s3(self) -> CheckpointSection:
        if self.mirror is not None and not re.match(r"s3://[^/@]+(/|$)", self.mirror):
            raise ValueError("mirror must be s3://bucket/prefix")
        return self


class PreemptionSection(Section):
    """What is done when the machine may be taken away, or one of the ranks gives no sign of life."""

    poll_seconds: float = Field(default=5.0, ge=0.1)  # between two looks for a notice of the spot market
    # on a rebalance recommendation: save and leave for a new start, save and go on, or nothing
    rebalance: Literal["stop", "save", "ignore"] = "stop"
    hang_seconds: float = Field(default=180.0, ge=5)  # a rank silent for so long ends the job


class TrackingSection(Section):
    """MLflow and TensorBoard. metrics.jsonl is always written."""

    mlflow: bool = True
    tensorboard: bool = False  # curves in the run's folder: tensorboard --logdir runs
    uri: str | None = None  # null: sqlite in run.folder
    experiment: str = "imagenet-sprint"
    parent_run_id: str | None = None  # MLflow id of the run that this one is a child of

    @model_validator(mode="after")
    def _no_secrets(self) -> TrackingSection:
        if self.uri is not None and has_credentials(self.uri):
            raise ValueError(
                "uri must not hold a password, as recipes are copied about: put the address into "
                "MLFLOW_TRACKING_URI, or user and password into MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        return self


class BudgetSection(Section):
    """What an hour costs (see train/prices.yaml), and what the run may cost in all."""

    usd_per_hour: float | None = Field(default=None, ge=0)
    instance_type: str | None = "g6.12xlarge"
    max_usd: float | None = Field(default=None, gt=0)
    max_hours: float | None = Field(default=None, gt=0)
    shorten: bool = False  # fewer epochs, annealed to the end, where the budget does not hold all of them


class ProfileSection(Section):
    """A torch profiler trace of the steps [first, end) of this start, and a page on where they go."""

    steps: tuple[int, int] = (10, 20)

    @model_validator(mode="after")
    def _order(self) -> ProfileSection:
        if not 0 <= self.steps[0] < self.steps[1] <= self.steps[0] + 1000:
            raise ValueError("steps must be [first, end], 0 <= first < end, at most 1000 steps")
        return self
