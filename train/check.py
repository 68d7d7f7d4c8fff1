"""`python -m train check RECIPE`: everything that can be wrong before torchrun starts, a sentence each."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Manifest, check_size, load_index, load_keys, load_manifest
from data_prep.storage import LocalFolder, crc32c, is_s3
from data_prep.verify import beton_fault
from train.checkpoint import CheckpointStore, load_checkpoint, mirror_fault
from train.config import Recipe
from train.cost import Budget, find_price
from train.data.device_augment import DeviceAugment
from train.data.folds import class_counts_of
from train.data.loaders import choose_backend
from train.data.order import check_batch_size
from train.data.staging import check_staging
from train.loss import class_weights
from train.models.build import build_model, model_fault
from train.models.heads import head_of, init_bce_bias, split_outputs
from train.optim import build_optimizer, optimizer_fault
from train.param_groups import trainable_fault
from train.run_folder import has_checkpoint, is_finished, recipe_differences
from train.teacher import Teacher
from train.tracking.tensorboard import require_tensorboard

CHECKED_BYTES = 1 << 30  # of each split: all of a small data set, an even sample of a large one


def find_faults(
    recipe: Recipe, default_name: str, world_size: int | None = None, fork: bool = False
) -> list[str]:
    """All faults of recipe, data, folder and machine that can be told without training.

    Args:
        fork: the run is to be forked: it may have another recipe, and be finished.
    """
    faults: list[str] = []

    def note(function, *arguments) -> None:
        try:
            result = function(*arguments)
        except (ValueError, RuntimeError, OSError) as error:
            faults.append(str(error))
        else:
            faults.extend(result or [])

    note(_data_faults, recipe)
    note(_model_faults, recipe)
    note(lambda: Budget(recipe.budget, find_price(recipe.budget)) and [])
    note(_augmentation_faults, recipe)
    if recipe.tracking.tensorboard:
        note(require_tensorboard)
    note(_loss_faults, recipe)
    note(check_batch_size, recipe.data.global_batch_size, recipe.data.accum_steps, world_size or 1)
    note(_run_faults, recipe, default_name, fork)
    return faults


def _data_faults(recipe: Recipe) -> list[str]:
    if is_s3(str(recipe.data.path)):
        manifest = check_staging(str(recipe.data.path), recipe.data.stage_folder)
        backend_fault = _backend_fault(recipe, manifest)
        return split_faults(manifest, recipe) + ([backend_fault] if backend_fault else [])
    folder = Path(recipe.data.path)
    manifest = load_manifest(folder)
    faults = split_faults(manifest, recipe)
    backend_fault = _backend_fault(recipe, manifest)
    if backend_fault:
        faults.append(backend_fault)
    for split in ("train", "val"):
        if split in manifest.splits:
            faults += _shard_faults(folder, manifest, split)
    return faults


def split_faults(manifest: Manifest, recipe: Recipe) -> list[str]:
    """Faults of a data set that make a training with this recipe impossible."""
    faults = []
    class_counts = class_counts_of(manifest, recipe.data)
    counts = {split: sum(of_classes) for split, of_classes in class_counts.items()}
    folds = "" if recipe.data.folds is None else f" without fold {recipe.data.fold}"
    if manifest.num_classes < 2:
        faults.append(f"{recipe.data.path} has {manifest.num_classes} class: a classifier needs two")
    if not counts["val"] and recipe.data.folds is None:
        faults.append(
            f"{recipe.data.path} has no validation images: prepare it again with more images a class, or a "
            "larger --val-fraction"
        )
    if "train" in manifest.splits:
        faults += _fold_faults(manifest, recipe)
    if counts["train"] < recipe.data.global_batch_size:
        faults.append(
            f"{recipe.data.path} has {counts['train']} training images{folds}, fewer than one step of "
            f"data.global_batch_size {recipe.data.global_batch_size}: choose a smaller one"
        )
    return faults


def _fold_faults(manifest: Manifest, recipe: Recipe) -> list[str]:
    num_folds, counts = recipe.data.folds, manifest.splits["train"].class_counts
    if num_folds is None:
        return []
    single = [name for name, count in zip(manifest.class_names, counts, strict=True) if count == 1]
    if single:
        # Held out with its fold, the class would have nothing to be learned from.
        more = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
        return [f"data.folds: class {single[0]!r}{more} has one training image: each class needs two or more"]
    if sum(counts) < num_folds:
        return [f"data.folds is {num_folds}, but there are {sum(counts)} training images: choose fewer folds"]
    return []


def _model_faults(recipe: Recipe) -> list[str]:
    """Build the model and pass two images through it, training and evaluating, at the recipe's sizes."""
    faults = [fault for fault in (model_fault(recipe.model), optimizer_fault(recipe.optimizer)) if fault]
    if faults:
        return faults
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about themselves
        # From a checkpoint, too: it may not fit. From the hub not: that takes a network and time.
        model = build_model(recipe.model.model_copy(update={"pretrained": False}), num_classes=7)
        head = head_of(model)
    if fault := trainable_fault(model, head, recipe.schedule.phases):
        return [fault]
    build_optimizer(model, recipe.optimizer, head)
    if recipe.loss.kind == "bce":
        init_bce_bias(model, 7)
    sides = sorted(set(recipe.data.resolutions.values()))
    for training, side in [*((True, side) for side in sides), (False, recipe.validation_resolution)]:
        doing = "training" if training else "validation"
        try:
            with torch.set_grad_enabled(training and side == sides[0]):
                output, _ = split_outputs(model.train(training)(torch.zeros(2, 3, side, side)))
                if output.requires_grad:
                    output.sum().backward()  # an activation that overwrites what is needed fails only here
        except Exception as error:  # models raise all kinds for a size that they do not take
            reason = str(error).split("\n")[0][:150]
            return [f"model.name: {recipe.model.name} does not take {side} px in {doing} ({reason})"]
        if not isinstance(output, torch.Tensor) or output.shape != (2, 7):
            return [f"model.name: {recipe.model.name} gives no plain class scores in {doing}: choose another"]
    return []


def _augmentation_faults(recipe: Recipe) -> list[str]:
    DeviceAugment(recipe.augmentation, (0.5, 0.5, 0.5))  # raises where a library is missing
    return []


def _loss_faults(recipe: Recipe) -> list[str]:
    """Class weights and teacher against the classes of the data set, where that can be read."""
    if is_s3(str(recipe.data.path)):
        return []
    try:
        manifest = load_manifest(Path(recipe.data.path))
    except (ValueError, OSError):
        return []  # said already
    if "train" in manifest.splits:
        class_weights(recipe.loss, manifest.num_classes, class_counts_of(manifest, recipe.data)["train"])
    if recipe.loss.distillation is not None:
        Teacher(recipe.loss.distillation.teacher, manifest.class_names, torch.device("cpu"))
    return []


def _backend_fault(recipe: Recipe, manifest: Manifest) -> str | None:
    try:
        choose_backend(recipe.data.loader, manifest.format)
    except ValueError as error:
        return str(error)
    return None


def _shard_faults(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Sizes and tables of all shards; bytes of all samples up to CHECKED_BYTES, else of an even sample."""
    entry = manifest.splits[split]  # type: ignore[index]
    index = load_index(folder, manifest, split)  # type: ignore[arg-type]
    content: list[np.memmap] = []
    for shard in entry.shards:
        check_size(folder / shard.name, shard)
        rows = index[index["shard"] == len(content)]
        if manifest.format == "ffcv" and (fault := beton_fault(LocalFolder(folder), shard.name, rows)):
            return [fault]
        content.append(np.memmap(folder / shard.name, np.uint8, "r"))
    share = min(1.0, CHECKED_BYTES / max(1, int(index["length"].sum())))
    num_checked = max(1, int(share * len(index))) if len(index) else 0
    for sample_id in np.linspace(0, len(index) - 1, num_checked).astype(int):
        row = index[sample_id]
        offset = int(row["offset"])
        jpeg = content[row["shard"]][offset : offset + int(row["length"])].tobytes()
        if crc32c(jpeg) != row["crc32c"]:
            key = load_keys(folder, manifest, split)[sample_id]  # type: ignore[arg-type]
            return [
                f"{folder / entry.shards[row['shard']].name} is damaged at sample {sample_id} ({key}): its "
                "bytes are not those that were prepared; copy the data set again, or prepare it again"
            ]
    return []


def _run_faults(recipe: Recipe, default_name: str, fork: bool) -> list[str]:
    folder = recipe.run.folder / (recipe.run.name or default_name)
    if fork:
        is_whole = CheckpointStore(folder / "checkpoints").newest_whole() is not None
        return [] if is_whole else [f"{folder} has no checkpoint to fork from: leave --fork out"]
    if is_finished(folder):
        named = f"run {folder.name} in {recipe.run.folder} is finished: choose another run.name"
        return [named] if recipe.run.name else []
    differences = recipe_differences(folder, recipe) if has_checkpoint(folder) else []
    faults = [f"run {folder.name} exists with another recipe: {d}" for d in differences]
    store = CheckpointStore(folder / "checkpoints")
    for entry in store.manifest().checkpoints:
        try:
            load_checkpoint(store.folder / entry.name)
        except ValueError as error:
            faults.append(str(error))
    if recipe.checkpoint.mirror is not None:
        fault = mirror_fault(f"{recipe.checkpoint.mirror.rstrip('/')}/{folder.name}")
        faults += [fault] if fault is not None else []
    return faults + _writable_fault(recipe.run.folder)


def _writable_fault(folder: Path) -> list[str]:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        return [f"run.folder {folder} cannot be written to ({os.strerror(error.errno or 0)}): choose another"]
    return []
