"""A checkpoint, run or exported folder as the page shows it: in PyTorch, with Grad-CAM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.manifest import Manifest, load_manifest
from data_prep.storage import is_s3
from evaluation.compare.runs import read_recipe, read_summary
from evaluation.explain.grad_cam import choose_layer, grad_cam
from evaluation.metrics import finite_number
from evaluation.predict import is_best_checkpoint, run_folder_of
from serve.classifier import TorchClassifier
from serve.model_folder import SAFETENSORS_NAME, is_exported
from serve.page.facts import facts_of
from serve.page.models import ShownModel
from serve.page.onnx_model import open_onnx
from serve.portable.limits import Limits
from train.config import Recipe
from train.run_folder import RECIPE_NAME, SUMMARY_NAME


class ExplainingClassifier(TorchClassifier):
    """A classifier that can tell what speaks for a class."""

    _layer: str | None = None  # found at the first explanation

    def heat(self, prepared: NDArray[np.uint8], label: int) -> NDArray[np.float32]:
        """Grad-CAM of a prepared image, uint8 (side, side, 3): float32 (side, side) in [0, 1].

        Raises:
            ValueError: the network has no map of features.
        """
        model, device = self.source.model, self.source.device
        images = self.source.normalize(torch.from_numpy(prepared[None]).to(device))
        with self._turn:
            if self._layer is None:
                self._layer = choose_layer(model, images)
            return grad_cam(model, images, torch.tensor([label]), self._layer)[0]


def open_shown(path: Path, limits: Limits) -> ShownModel:
    """Whatever is at `path`, ready to be shown.

    Raises:
        ValueError: there is no model, or it is damaged.
    """
    if is_exported(path) and not (path / SAFETENSORS_NAME).is_file():
        return open_onnx(path, limits)
    explaining = ExplainingClassifier(path, limits, manifest=manifest_of(path))
    extra = [("Computed by", "PyTorch")]
    if top1 := top1_of(path):
        extra.insert(0, ("Top-1 on its validation images", top1))
    heat = explaining.heat if _has_map(explaining) else None
    return ShownModel(explaining, heat, facts_of(explaining.info, *extra))


def top1_of(path: Path) -> str:
    """`84.72%`: of a run's best checkpoint, as the run measured it; empty where it is not known."""
    folder = run_folder_of(path) if is_best_checkpoint(path) else None
    value = finite_number(read_summary(folder / SUMMARY_NAME, []).get("best_top1")) if folder else None
    return "" if value is None else f"{100 * value:.2f}%"


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of the run that `path` belongs to, where it lies there."""
    folder = run_folder_of(path)
    return read_recipe(folder / RECIPE_NAME, []) if folder else None


def data_of(path: Path) -> Path | None:
    """The data set of the run that `path` belongs to, where this machine still has it."""
    recipe = recipe_of(path)
    if recipe is None or is_s3(str(recipe.data.path)):
        return None
    folder = Path(recipe.data.path)
    return folder if (folder / "manifest.json").is_file() else None


def manifest_of(path: Path) -> Manifest | None:
    """How the data set calls its classes and made its images, where that can be known."""
    folder = data_of(path)
    try:
        return load_manifest(folder) if folder else None
    except (ValueError, OSError):
        return None


def _has_map(classifier: ExplainingClassifier) -> bool:
    side = classifier.info.preprocessing.resolution
    try:
        classifier.heat(np.zeros((side, side, 3), np.uint8), 0)
    except ValueError:
        return False
    return True
