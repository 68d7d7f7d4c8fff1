"""A checkpoint's logits for every sample of a split.

Example:
    >>> trained = load_trained(Path("runs/demo"), torch.device("cpu"))
    >>> predictions = predict(trained, Path("data/intel"), "val", loader="auto")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from data_prep.manifest import ImageSettings, load_manifest
from data_prep.progress import progress_bar
from data_prep.storage import sha256_file
from evaluation.metrics import Predictions
from train.checkpoint import BEST_NAME, CheckpointStore, content_fault, load_checkpoint, missing_keys
from train.config import Recipe, parse_recipe
from train.data.batch import Normalize, normalization_statistics
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import distributed
from train.models.build import build_model
from train.precision import build_autocast, choose_precision
from train.validation import mean_logits


@dataclass(frozen=True)
class TrainedModel:
    """A model as it was saved, with what belongs to it."""

    model: nn.Module
    normalize: Normalize
    recipe: Recipe
    class_names: tuple[str, ...]
    progress: dict[str, Any]
    device: torch.device
    data_identity: str = ""  # SHA-256 of the index of the samples it was trained on; empty where unknown
    display_names: tuple[str, ...] = ()
    image_settings: ImageSettings | None = None  # how its images were made; None of older checkpoints


def load_trained(path: Path, device: torch.device) -> TrainedModel:
    """The model of a checkpoint file or run folder, in evaluation mode on `device`.

    Raises:
        ValueError: no whole checkpoint there, or one whose recipe this version does not know.
    """
    state = load_checkpoint(path)
    if missing := missing_keys(state):
        raise ValueError(
            f"{path} is not a complete checkpoint of this project: it lacks {', '.join(missing)}"
        )
    if fault := content_fault(state):
        raise ValueError(f"{path} is not a checkpoint of this project: {fault}")
    try:
        recipe = parse_recipe(state["recipe"])
    except ValueError:
        raise ValueError(f"the recipe inside {path} is of another version of this project") from None
    # The weights come from the checkpoint: never fetch pretrained ones first.
    config = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = build_model(config, len(state["class_names"]))
    try:
        model.load_state_dict(state["ema" if state.get("headline_weights") == "ema" else "model"])
    except RuntimeError:
        raise ValueError(f"the weights in {path} do not fit its own recipe ({config.name})") from None
    statistics = normalization_statistics(
        recipe.data.normalization, tuple(state["mean"]), tuple(state["std"])
    )
    return TrainedModel(
        model=model.to(device).eval(),
        normalize=Normalize(*statistics, channels_last=recipe.model.channels_last).to(device),
        recipe=recipe,
        class_names=tuple(state["class_names"]),
        progress=state["progress"],
        device=device,
        data_identity=str(state.get("data_identity") or ""),
        display_names=_display_names(state),
        image_settings=_image_settings(state),
    )


def _display_names(state: dict[str, Any]) -> tuple[str, ...]:
    names = state.get("display_names")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _image_settings(state: dict[str, Any]) -> ImageSettings | None:
    try:
        return ImageSettings.model_validate(state["image_settings"])
    except (KeyError, ValidationError):
        return None


def load_trained_with_sha256(path: Path, device: torch.device) -> tuple[TrainedModel, str]:
    """`load_trained`, and the SHA-256 of the very file.

    Raises:
        ValueError: as there.
        RuntimeError: a training that runs replaced the file meanwhile.
    """
    file = checkpoint_file(path)
    before = sha256_file(file) if file.is_file() else ""
    trained = load_trained(path, device)
    if sha256_file(file) != before:
        raise RuntimeError(f"{file} was replaced while it was read: run the same command again")
    return trained, before


def checkpoint_file(path: Path) -> Path:
    """The file that `load_trained` reads of a run folder, or of its checkpoints; else the path itself."""
    if not path.is_dir():
        return path
    return (path if path.name == "checkpoints" else path / "checkpoints") / BEST_NAME


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run a checkpoint lies in, or None for one on its own."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder if (folder / "checkpoints").is_dir() else None


def is_best_checkpoint(path: Path) -> bool:
    """Whether what `load_trained` reads there is its run's best one, whose accuracy the run states."""
    file = checkpoint_file(path)
    return file.name == BEST_NAME or CheckpointStore(file.parent).manifest().best == file.name


@torch.inference_mode()
def predict(
    trained: TrainedModel,
    folder: Path,
    split: Literal["train", "val"] = "val",
    loader: str = "auto",
    resolution: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    held_out: bool = False,
    leave_out_damaged: bool = False,
) -> Predictions:
    """Logits of all samples of a split, with the training's own preprocessing.

    Args:
        held_out: in place of `split`, what the training itself was validated on: with `data.folds`, its fold
            of the train split.
        leave_out_damaged: predict the intact samples; the others are named on the terminal.
        resolution: side in pixels; None: the recipe's validation resolution.

    Raises:
        ValueError: the data set has other classes than the checkpoint, or no such split.
        RuntimeError: a sample is damaged, or every one.
    """
    recipe = trained.recipe
    manifest = load_manifest(folder)
    if manifest.class_names != trained.class_names:
        raise ValueError(
            f"{folder} has other classes than the checkpoint was trained on ({manifest.num_classes} and "
            f"{len(trained.class_names)}): evaluate it on the data set it was trained for"
        )
    if split not in manifest.splits:
        raise ValueError(f"{folder} has no split {split!r}: it holds {', '.join(manifest.splits)}")
    autocast = build_autocast(choose_precision(recipe.precision.mode, trained.device), trained.device)
    config = recipe.validation.model_copy(update={"batch_size": batch_size or recipe.validation.batch_size})
    with distributed() as ranks:
        if held_out:
            plan = LoaderPlan.held_out(folder, manifest, config, recipe.data, ranks)
        else:
            plan = LoaderPlan.validation(folder, manifest, config, recipe.data, ranks, split)
        source = build_loader(loader, plan)
        logits, labels, ids = [], [], []
        side = resolution or recipe.validation_resolution
        with progress_bar(source.num_samples, "evaluate", progress) as bar:
            for batch in source.epoch(0, resolution=side):
                images = batch.images.to(trained.device, non_blocking=True)
                with autocast:
                    output = mean_logits(
                        trained.model, trained.normalize(images), recipe.validation.flip_average
                    )
                logits.append(output.cpu().numpy())
                labels.append(batch.labels.numpy())
                ids.append(batch.sample_ids.numpy())
                bar.update(len(batch))
        source.close()
        if source.damaged and not (leave_out_damaged and ids):
            raise RuntimeError(
                f"{len(source.damaged)} of {source.num_samples:,} samples are damaged, the figures would not "
                f"be those of the whole split: copy {folder} again, or prepare it again"
            )
    return Predictions(
        np.concatenate(logits), np.concatenate(labels), np.concatenate(ids), manifest.class_names
    )
