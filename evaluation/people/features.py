"""Features of a split: of layers of a network, and of the pixels alone for comparison.

Example:
    >>> found = extract_features(trained, Path("data/rocks"), "train", ["penultimate"])
    >>> found.layers["penultimate"].shape
    (360, 512)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from data_prep.manifest import Manifest
from data_prep.progress import progress_bar
from evaluation.people.layers import Layer, LayerCapture, Pooling, list_layers
from evaluation.predict import TrainedModel
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import distributed
from train.models.build import build_model

MAX_FEATURE_BYTES = 4 << 30
THUMBNAIL_SIDE = 8  # pixels


@dataclass(frozen=True)
class SplitFeatures:
    """Features by sample id.

    Attributes:
        layers: layer → float32 (samples, features).
        mean_colour: (samples, 3), of each image as the network sees it.
        thumbnails: (samples, 192), the image averaged down to 8×8 pixels.
        labels: int64 (samples,).
    """

    layers: dict[str, NDArray[np.float32]]
    mean_colour: NDArray[np.float32]
    thumbnails: NDArray[np.float32]
    labels: NDArray[np.int64]


def layers_of(trained: TrainedModel, resolution: int) -> list[Layer]:
    """The layers of a network for images of `resolution` pixels, in the order of a pass."""
    images = torch.zeros(2, resolution, resolution, 3, dtype=torch.uint8, device=trained.device)
    return list_layers(trained.model, trained.normalize(images))


def untrained_copy(trained: TrainedModel, seed: int) -> nn.Module:
    """The same architecture with random weights, in evaluation mode on the same device."""
    config = trained.recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, len(trained.class_names))
    return model.to(trained.device).eval()


@torch.inference_mode()
def extract_features(
    trained: TrainedModel,
    folder: Path,
    manifest: Manifest,
    split: Literal["train", "val"],
    layers: list[str],
    *,
    model: nn.Module | None = None,
    pooling: Pooling = "mean",
    loader: str = "auto",
    resolution: int | None = None,
    description: str = "features",
    progress: bool = True,
) -> SplitFeatures:
    """Features of all samples of a split, in fp32, each image seen once, whole and not mirrored.

    Args:
        model: a network in place of the trained one, with the same layers.

    Raises:
        ValueError: the features would not fit 4 GiB.
        RuntimeError: a sample is damaged.
    """
    recipe, network = trained.recipe, model or trained.model
    captured: dict[str, list[NDArray[np.float32]]] = {name: [] for name in layers}
    colours: list[NDArray[np.float32]] = []
    thumbnails: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    ids: list[NDArray[np.int64]] = []
    with distributed() as ranks:
        plan = LoaderPlan.validation(folder, manifest, recipe.validation, recipe.data, ranks, split)
        source = build_loader(loader, plan)
        side = resolution or recipe.validation_resolution
        with (
            LayerCapture(network, layers, pooling) as capture,
            progress_bar(source.num_samples, description, progress) as bar,
        ):
            for batch in source.epoch(0, resolution=side):
                images = batch.images.to(trained.device, non_blocking=True)
                network(trained.normalize(images))
                if not ids:
                    _check_size(capture.features, source.num_samples)
                for name in layers:
                    captured[name].append(capture.features[name].numpy())
                small = functional.adaptive_avg_pool2d(
                    images.permute(0, 3, 1, 2).float() / 255, THUMBNAIL_SIDE
                )
                thumbnails.append(small.flatten(1).cpu().numpy())
                colours.append((images.float() / 255).mean((1, 2)).cpu().numpy())
                labels.append(batch.labels.numpy())
                ids.append(batch.sample_ids.numpy())
                bar.update(len(batch))
        source.close()
        if source.damaged:
            raise RuntimeError(
                f"{len(source.damaged)} of {source.num_samples:,} samples are damaged, and rows would be "
                f"missing: copy {folder} again, or prepare it again"
            )
    order = np.argsort(np.concatenate(ids))
    return SplitFeatures(
        layers={name: np.concatenate(parts)[order] for name, parts in captured.items()},
        mean_colour=np.concatenate(colours)[order],
        thumbnails=np.concatenate(thumbnails)[order],
        labels=np.concatenate(labels)[order].astype(np.int64),
    )


def _check_size(features: dict[str, torch.Tensor], num_samples: int) -> None:
    row_bytes = 4 * sum(tensor.shape[1] for tensor in features.values())
    if row_bytes * num_samples > MAX_FEATURE_BYTES:
        raise ValueError(
            f"the features of {len(features)} layers take {row_bytes * num_samples / 2**30:.0f} GiB: name "
            "fewer layers, or use --pool mean"
        )


def class_means(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: NDArray[np.int64],
    class_names: tuple[str, ...],
) -> NDArray[np.float64]:
    """Mean features of each of `classes`: float64 (len(classes), features).

    Raises:
        ValueError: one of them has no sample in the split.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if missing := [label for label in classes.tolist() if counts[label] == 0]:
        raise ValueError(
            f"class {class_names[missing[0]]!r} has no image in this split: evaluate another (--split)"
        )
    sums = np.zeros((len(class_names), features.shape[1]))
    np.add.at(sums, labels, features.astype(np.float64))
    return sums[classes] / counts[classes, None]
