"""What a recipe has to compute: images, resolutions, the cost of one image, and the bytes to be copied.

The unit is a ResNet-50's training step on one image at 224 px. Another resolution costs in proportion to its
pixels, another network to its multiply-adds (`docs/recipes.md`); validation is a forward pass, a third of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import load_manifest
from infra.errors import UserError
from infra.plan.dated import load_dated
from train.config import Recipe, RecipeError, load_recipe

REFERENCE_SIDE = 224
REFERENCE_GMACS = 4.11  # of a ResNet-50 at 224 px
COUNT_SECONDS = 180


@dataclass(frozen=True)
class DataSize:
    """Images of a data set, and its bytes; `source` says who counted."""

    name: str
    num_train: int
    num_val: int
    num_bytes: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Segment:
    """Epochs in a row at one resolution, in pixels."""

    resolution: int
    num_epochs: int


@dataclass(frozen=True)
class Work:
    """All that the estimate needs to know of a recipe.

    Attributes:
        image_cost: of one training image at 224 px, in a ResNet-50's; with SAM's second passes.
        gradient_bytes: of one step, in fp32.
        validation_images: forward passes of all validations, in training images at 224 px.
        network_note: how the network's cost was found.
    """

    recipe_path: Path
    name: str
    segments: tuple[Segment, ...]
    data: DataSize
    image_cost: float
    sam_factor: float
    gradient_bytes: float
    global_batch_size: int
    accum_steps: int
    validation_images: float
    network_note: str
    network_measured: bool
    max_hours: float | None
    max_usd: float | None
    early_stopping: bool
    instance_type: str | None

    @property
    def num_epochs(self) -> int:
        return sum(segment.num_epochs for segment in self.segments)

    @property
    def epochs_at_224(self) -> float:
        """Epochs of images of 224 px with as many pixels; a step of SAM counts twice."""
        pixels = sum(segment.num_epochs * segment.resolution**2 for segment in self.segments)
        return pixels / REFERENCE_SIDE**2 * self.sam_factor


def work_of(path: Path, overrides: list[str] | None = None, data: str | None = None) -> Work:
    """Read a recipe and say what it has to compute.

    Args:
        data: a folder or `s3://…` with a manifest; None: the recipe's own folder where it is there, else the
            size that is known of a data set of this name.

    Raises:
        UserError: the recipe has faults, or the size of its data is not known.
    """
    try:
        recipe = load_recipe(path, list(overrides or []))
    except RecipeError as error:
        raise UserError(str(error)) from None
    size = _data_size(recipe, data)
    num_train, num_val = size.num_train, size.num_val
    if recipe.data.folds is not None:
        num_val = num_train // recipe.data.folds
        num_train -= num_val
        size = DataSize(size.name, num_train, num_val, size.num_bytes, size.source, size.measured)
    cost, params, note, measured = _network(recipe, path, overrides)
    sam = recipe.optimizer.sam
    return Work(
        recipe_path=path,
        name=recipe.run.name or path.stem,
        segments=_segments(recipe),
        data=size,
        image_cost=cost,
        sam_factor=1 if sam is None else 1 + 1 / sam.every_steps,
        gradient_bytes=params * 4e6,
        global_batch_size=recipe.data.global_batch_size,
        accum_steps=recipe.data.accum_steps,
        validation_images=_validation_images(recipe, num_val),
        network_note=note,
        network_measured=measured,
        max_hours=recipe.budget.max_hours,
        max_usd=recipe.budget.max_usd,
        early_stopping=recipe.schedule.early_stopping is not None,
        instance_type=recipe.budget.instance_type,
    )


def _segments(recipe: Recipe) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for epoch in range(recipe.num_epochs):
        side = recipe.data.resolution_at(epoch)
        if segments and segments[-1].resolution == side:
            segments[-1] = Segment(side, segments[-1].num_epochs + 1)
        else:
            segments.append(Segment(side, 1))
    return tuple(segments)


def _validation_images(recipe: Recipe, num_val: int) -> float:
    validation = recipe.validation
    views = [(recipe.validation_resolution, validation.flip_average)]
    for view in validation.views.values():
        flip = validation.flip_average if view.flip_average is None else view.flip_average
        views.append((view.resolution or recipe.validation_resolution, flip))
    passes = sum((2 if flip else 1) * side**2 / REFERENCE_SIDE**2 for side, flip in views)
    times = -(-recipe.num_epochs // validation.every_epochs)
    return times * num_val * passes / 3


def _data_size(recipe: Recipe, data: str | None) -> DataSize:
    location = data if data is not None else str(recipe.data.path)
    is_here = not location.startswith("s3://") and (Path(location) / "manifest.json").is_file()
    if data is not None or is_here:
        try:
            manifest = load_manifest(location)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(str(error)) from None
        counts = {name: split.num_samples for name, split in manifest.splits.items()}
        size = sum(file.bytes for file in manifest.files)
        return DataSize(
            location, counts.get("train", 0), counts.get("val", 0), size, f"manifest of {location}", True
        )
    known = load_dated("throughput.yaml")["data_sets"]
    name = recipe.data.name
    if name not in known:
        raise UserError(
            f"nobody knows how large {location} is: pass --data with the prepared data set (a folder or s3://…)"
        )
    row = known[name]
    return DataSize(name, row["train"], row["val"], float(row["bytes"]), row["source"], False)


def _network(recipe: Recipe, path: Path, overrides: list[str] | None) -> tuple[float, float, str, bool]:
    """Cost of an image at 224 px in a ResNet-50's, 10⁶ parameters, how that is known, and if by counting."""
    model = recipe.model
    known = load_dated("throughput.yaml")["networks"]
    plain = not {key for key in model.options if key != "transform_input"}
    if plain and model.name in known:
        row = known[model.name]
        gmacs = row["gmacs"] * (REFERENCE_SIDE / row["at"]) ** 2
        note = f"{model.name}: {row['gmacs']:.2f} × 10⁹ multiply-adds at {row['at']} px"
        return gmacs / REFERENCE_GMACS, float(row["params"]), note, False
    counted = _count(path, overrides)
    if counted is None:
        note = f"{model.name}: its multiply-adds could not be counted, so it is taken for a ResNet-50"
        return 1.0, 25.6, note, False
    note = f"{model.name}: {counted['gmacs']:.2f} × 10⁹ multiply-adds at {REFERENCE_SIDE} px, counted"
    return counted["gmacs"] / REFERENCE_GMACS, counted["params"] / 1e6, note, True


def _count(path: Path, overrides: list[str] | None) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "train.multiply_adds", str(path), *(overrides or [])]
    command += ["--resolution", str(REFERENCE_SIDE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_SECONDS)
        counted: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, OSError, ValueError):
        return None
    return counted if counted.get("gmacs") else None
