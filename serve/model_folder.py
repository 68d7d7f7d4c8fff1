"""The exported folder: a model in one or several forms, its preprocessing and classes, and its card.

    exported/mine/
      preprocessing.json   resolution, crop, mean and std, class names, the recipe's model section, provenance
      README.md            the model card
      export.json          what was measured of each form against the checkpoint
      model.safetensors    the weights; config.json: as timm wants it, where timm can build the network
      model.onnx, model.int8.onnx, model.torchscript.pt, model.pt2

Example:
    >>> trained = load_folder_model(Path("exported/mine"), torch.device("cpu"))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from data_prep.manifest import ImageSettings, Manifest
from evaluation.predict import TrainedModel, is_best_checkpoint, load_trained_with_sha256, run_folder_of
from serve.portable.model_info import ModelInfo, load_info
from serve.portable.preprocessing import Preprocessing
from train.config import ModelSection, Recipe
from train.data.batch import Normalize, normalization_statistics
from train.models.build import build_model
from train.models.weights import read_weights

SAFETENSORS_NAME = "model.safetensors"
TIMM_CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
EXPORT_NAME = "export.json"
ASSUMED = "assumed: the defaults"
FORM_FILES = {
    "safetensors": SAFETENSORS_NAME,
    "onnx": "model.onnx",
    "int8": "model.int8.onnx",
    "torchscript": "model.torchscript.pt",
    "pt2": "model.pt2",
}


@dataclass(frozen=True)
class Source:
    """A model in memory, with what belongs to it; from a checkpoint or an exported folder.

    Attributes:
        model: float NCHW → logits, in evaluation mode. normalize: uint8 NHWC → its input.
        run_folder: where the run lies, for its summary and report; None where there is none.
        recipe: of the training; None for an exported folder.
        is_best: whether it is the run's best checkpoint, whose accuracy the run states.
    """

    model: nn.Module
    normalize: Normalize
    info: ModelInfo
    device: torch.device
    run_folder: Path | None = None
    recipe: Recipe | None = None
    is_best: bool = False


def is_exported(path: Path) -> bool:
    """Whether a path is an exported folder, and not a run."""
    return path.is_dir() and (path / "preprocessing.json").is_file()


def load_source(path: Path, device: torch.device | None = None, manifest: Manifest | None = None) -> Source:
    """A checkpoint file, a run folder (its best one) or an exported folder, on `device`, in fp32.

    Args:
        manifest: of the data set it was trained on: how its images were made, what its classes are called.

    Raises:
        ValueError: there is none of these, or it is damaged.
    """
    device = device or torch.device("cpu")
    if is_exported(path):
        return _load_exported(path, device)
    trained, digest = load_trained_with_sha256(path, device)
    return Source(
        model=trained.model,
        normalize=trained.normalize,
        info=info_of(trained, path, digest, manifest),
        device=device,
        run_folder=run_folder_of(path),
        recipe=trained.recipe,
        is_best=is_best_checkpoint(path),
    )


def info_of(trained: TrainedModel, path: Path, digest: str, manifest: Manifest | None = None) -> ModelInfo:
    """What belongs to a trained model; see `load_source`."""
    recipe = trained.recipe
    images = trained.image_settings or ImageSettings()
    run_folder = run_folder_of(path)
    info = ModelInfo(
        preprocessing=Preprocessing(
            resolution=recipe.validation_resolution,
            crop_ratio=recipe.validation.crop_ratio,
            mean=_statistics(trained)[0],
            std=_statistics(trained)[1],
            resolution_cap=images.resolution_cap,
            cap_side=images.cap_side,
            apply_exif=images.apply_exif,
        ),
        class_names=trained.class_names,
        display_names=_display_names(trained.display_names, trained.class_names),
        flip_average=recipe.validation.flip_average,
        # Where the first weights lay is a folder of this machine, and the network is built without.
        model=recipe.model.model_dump(mode="json") | {"checkpoint": None},
        provenance={
            "run": run_folder.name if run_folder else recipe.run.name,
            "checkpoint_sha256": digest,
            "epoch": trained.progress.get("epoch"),
            "weights": recipe.headline_weights,
            "data_set": recipe.data.name,
            "data_index_sha256": trained.data_identity,
            "image_settings": ASSUMED if trained.image_settings is None else "of the checkpoint",
        },
    )
    return info if manifest is None else with_data_set(info, manifest)


def with_data_set(info: ModelInfo, manifest: Manifest) -> ModelInfo:
    """`info` with what the data set says: how its images were made, what its classes are called.

    Raises:
        ValueError: it has other classes.
    """
    if manifest.class_names != info.class_names:
        raise ValueError(
            f"the data set has other classes than the checkpoint was trained on ({manifest.num_classes} and "
            f"{len(info.class_names)}): name the one it was trained on"
        )
    images = manifest.images
    return replace(
        info,
        preprocessing=replace(
            info.preprocessing,
            resolution_cap=images.resolution_cap,
            cap_side=images.cap_side,
            apply_exif=images.apply_exif,
        ),
        display_names=_display_names(manifest.display_names, manifest.class_names),
        provenance=info.provenance | {"image_settings": "of the data set"},
    )


def _statistics(trained: TrainedModel) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """As they were written: the buffers of `Normalize` hold them in other units."""
    mean = tuple(float(value) for value in trained.normalize.mean.double().cpu() / 255)
    std = tuple(float(value) for value in 1 / (255 * trained.normalize.scale.double().cpu()))
    return mean, std  # type: ignore[return-value]


def _display_names(shown: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    return shown if len(shown) == len(names) and shown != names else ()


def _load_exported(folder: Path, device: torch.device) -> Source:
    info = load_info(folder)
    path = info.file(folder, "safetensors")
    section = model_section(info, folder)
    model = build_model(section, len(info.class_names))
    weights = read_weights(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{path} does not fit the model of {folder / 'preprocessing.json'}") from None
    steps = info.preprocessing
    statistics = normalization_statistics("dataset", steps.mean, steps.std)
    normalize = Normalize(*statistics, channels_last=section.channels_last)
    return Source(model.to(device).eval(), normalize.to(device), info, device)


def model_section(info: ModelInfo, folder: Path) -> ModelSection:
    """The recipe's model section in an exported folder. ValueError: it is none of this version."""
    section: dict[str, Any] = {**info.model, "pretrained": False, "checkpoint": None}
    try:
        return ModelSection(**section)
    except ValidationError:
        raise ValueError(
            f"the model in {folder / 'preprocessing.json'} is of another version of this project"
        ) from None
