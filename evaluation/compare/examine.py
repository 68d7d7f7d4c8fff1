"""Everything about one run: its record, its network, its predictions, what it costs.

Example:
    >>> run = examine("A", read_run_folder(Path("runs/demo")), data=None, split="val", loader="auto",
    ...               with_measurements=False, say=print)
    >>> run.figures["best_top1"], run.notes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from data_prep.manifest import Manifest, load_manifest
from evaluation.compare.figures import ComparedRun, run_figures, with_figures
from evaluation.compare.model_cost import NOTHING_MEASURED, measure_cost, static_cost
from evaluation.compare.predicted import FoundPredictions, new_predictions, saved_predictions
from evaluation.compare.runs import RunRecord, index_sha256, own_manifest
from evaluation.predict import TrainedModel, load_trained
from train.config import Recipe
from train.data.folds import class_counts_of, fold_identity
from train.models.build import build_model
from train.validation import views_of


def examine(
    letter: str,
    record: RunRecord,
    *,
    data: Path | None,
    split: Literal["train", "val"],
    loader: str,
    with_measurements: bool,
    say: Callable[[str], None],
) -> ComparedRun:
    """Everything about one run; what cannot be had is a note.

    Args:
        data: the data set to predict on; None: only what reports saved is used.
        say: takes a line of progress.

    Raises:
        RuntimeError: samples of the data set are damaged.
    """
    notes: list[str] = []
    manifest = own_manifest(record)
    trained = _load(record, notes)
    recipe = record.recipe if trained is None else trained.recipe
    num_classes = None if manifest is None else manifest.num_classes
    static, measured = None, NOTHING_MEASURED
    if trained is not None:
        num_classes = len(trained.class_names)
        if recipe is not None:
            static = static_cost(trained.model, recipe.validation_resolution)
    elif recipe is not None and num_classes is not None:
        config = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
        static = static_cost(build_model(config, num_classes), recipe.validation_resolution)
    found = _predictions(letter, record, trained, recipe, data, split, loader, notes, say)
    del trained  # before the next one is loaded
    run = ComparedRun(
        letter=letter,
        record=record if recipe is None else replace(record, recipe=recipe),
        static=static,
        predictions=None if found is None else found.predictions,
        predictions_sha256="" if found is None else found.data_sha256,
        num_classes=num_classes,
        num_images=_num_own_images(manifest, recipe),
        data_sha256=_own_images_sha256(manifest, recipe),
    )
    if with_measurements and recipe is not None and num_classes is not None:
        say(f"{letter} {record.name}: measuring speed and memory")
        is_of_gpu = run_figures(run).get("training_memory_of") == "the GPU"
        world_size = max(1, int(record.number("world_size") or 1))
        measured = measure_cost(
            recipe, num_classes, recipe.validation_resolution, world_size, with_training=not is_of_gpu
        )
        notes += measured.notes
    return with_figures(replace(run, measured=measured, notes=(*record.notes, *notes)))


def _num_own_images(manifest: Manifest | None, recipe: Recipe | None) -> int | None:
    """How many images the run's own figures are of: of the validation split, or of its fold."""
    if manifest is None:
        return None
    if recipe is not None:
        return sum(class_counts_of(manifest, recipe.data)["val"])
    return manifest.splits["val"].num_samples if "val" in manifest.splits else None


def _own_images_sha256(manifest: Manifest | None, recipe: Recipe | None) -> str | None:
    """What tells these images from others; None where it is not known."""
    fold = None if recipe is None else fold_identity(recipe.data)
    digest = index_sha256(manifest, "val" if fold is None else "train")
    if fold is None or digest is None:
        return digest
    return hashlib.sha256(f"{digest} {fold}".encode()).hexdigest()


def _load(record: RunRecord, notes: list[str]) -> TrainedModel | None:
    if record.checkpoint is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_trained(record.checkpoint, device)
    except (ValueError, RuntimeError, OSError) as error:
        notes.append(f"Its checkpoint cannot be used: {error}.")
        return None


def _predictions(
    letter: str,
    record: RunRecord,
    trained: TrainedModel | None,
    recipe: Recipe | None,
    data: Path | None,
    split: Literal["train", "val"],
    loader: str,
    notes: list[str],
    say: Callable[[str], None],
) -> FoundPredictions | None:
    """Those that a report saved, or new ones where there is a data set to make them on."""
    wanted_sha256 = None if data is None else index_sha256(load_manifest(data), split)
    view = None if recipe is None else views_of(recipe)[0].words
    found, note = saved_predictions(record, split, data_sha256=wanted_sha256, view=view)
    if found is not None:
        return found
    if data is None or trained is None:
        notes += [note] if note else []
        return None
    say(f"{letter} {record.name}: predicting")
    try:
        return new_predictions(trained, data, split, loader)
    except ValueError as error:
        notes.append(f"It is compared by its own figures only: {error}.")
        return None
