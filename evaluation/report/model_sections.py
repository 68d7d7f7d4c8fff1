"""The sections that run the model again on a few images, and their options: robustness and Grad-CAM."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from data_prep.progress import progress_bar
from evaluation.crops import validation_crops
from evaluation.explain.capture import find_module
from evaluation.explain.grad_cam import choose_layer, grad_cam, map_grid, overlay
from evaluation.metrics import Predictions, softmax
from evaluation.predict import TrainedModel
from evaluation.report.section import Section
from evaluation.report.sections.grad_cam import (
    HEADING,
    ClassMap,
    ExplainedImage,
    build_grad_cam,
    choose_images,
)
from evaluation.report.sections.robustness import build_robustness
from evaluation.robustness.corruptions import GROUPS, kinds_of
from evaluation.robustness.measure import (
    classifier_of,
    corrupted_examples,
    measure_robustness,
    parse_severities,
    stratified_sample,
)

SEED = 0
MAX_EXPLAINED = 200  # images on a page that is still read
MAX_CROP_BYTES = 4 << 30  # of the images that robustness keeps in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--robustness",
        nargs="?",
        const="all",
        choices=["all", *GROUPS],
        help="measure the accuracy under corruptions of this group (alone: all), ImageNet-C-style; minutes",
    )
    parser.add_argument(
        "--robustness-images",
        type=int,
        default=1000,
        metavar="N",
        help="how many, drawn by class (default: 1000)",
    )
    parser.add_argument(
        "--robustness-severities", default="1,3,5", metavar="LIST", help="from 1 to 5 (default: 1,3,5)"
    )
    parser.add_argument(
        "--grad-cam", type=int, default=8, metavar="N", help="images to explain; 0: none (default: 8)"
    )
    parser.add_argument(
        "--grad-cam-layer", metavar="NAME", help="default: the last one with a map of features"
    )


def check_arguments(options: argparse.Namespace, model: nn.Module, resolution: int) -> None:
    """Raise ValueError for values that make no sense, before anything is computed."""
    parse_severities(options.robustness_severities)
    most = MAX_CROP_BYTES // (3 * resolution**2)
    if options.robustness and not 1 <= options.robustness_images <= most:
        raise ValueError(
            f"--robustness-images is {options.robustness_images}: it must be from 1 to {most:,} at "
            f"{resolution} pixels, which take 4 GB of memory"
        )
    if not 0 <= options.grad_cam <= MAX_EXPLAINED:
        raise ValueError(f"--grad-cam is {options.grad_cam}: it must be from 0 to {MAX_EXPLAINED} images")
    if options.grad_cam_layer is not None:
        find_module(model, options.grad_cam_layer)


def build_model_sections(
    trained: TrainedModel, predictions: Predictions, options: argparse.Namespace, resolution: int
) -> list[Section]:
    """What the options ask for, on crops of `resolution` pixels.

    Raises:
        ValueError: no such layer. RuntimeError: a sample is damaged.
    """
    sections: list[Section | None] = []
    if options.robustness:
        sections.append(_robustness(trained, predictions, options, resolution))
    if options.grad_cam:
        sections.append(_grad_cam(trained, predictions, options, resolution))
    return [section for section in sections if section is not None]


def _robustness(
    trained: TrainedModel, predictions: Predictions, options: argparse.Namespace, resolution: int
) -> Section:
    # By sample id, whatever the order of the predictions: two checkpoints are measured on the same images.
    order = predictions.sample_ids.argsort()
    chosen = order[stratified_sample(predictions.labels[order], options.robustness_images, SEED)]
    ids, labels = predictions.sample_ids[chosen], predictions.labels[chosen]
    folder = Path(options.data)
    crops = validation_crops(trained, folder, options.split, ids, resolution=resolution, progress=True)
    classify, kinds = classifier_of(trained), kinds_of(options.robustness)
    severities = parse_severities(options.robustness_severities)
    result = measure_robustness(
        crops,
        labels,
        ids,
        classify,
        kinds,
        severities=severities,
        seed=SEED,
        num_in_split=predictions.num_samples,
    )
    examples = corrupted_examples(
        crops, labels, ids, classify, kinds, severity=severities[len(severities) // 2], seed=SEED
    )
    return build_robustness(result, examples, predictions.class_names)


def _grad_cam(
    trained: TrainedModel, predictions: Predictions, options: argparse.Namespace, resolution: int
) -> Section | None:
    chosen = choose_images(predictions, options.grad_cam, SEED)
    ids = predictions.sample_ids[chosen]
    crops = validation_crops(trained, Path(options.data), options.split, ids, resolution=resolution)
    items: list[ExplainedImage] = []
    layer, grid = options.grad_cam_layer, (0, 0)
    with progress_bar(len(chosen), "explain") as bar:
        for place, crop in zip(chosen.tolist(), crops, strict=True):
            image = trained.normalize(torch.from_numpy(crop)[None].to(trained.device))
            if layer is None:
                try:
                    layer = choose_layer(trained.model, image)
                except ValueError as error:  # nobody asked for it: the report is as good without
                    return Section(HEADING, str(error), "")
            predicted, true = int(predictions.predicted_labels[place]), int(predictions.labels[place])
            asked = torch.tensor([predicted] if predicted == true else [predicted, true])
            if not items:
                grid = map_grid(trained.model, image, layer)
            maps = grad_cam(trained.model, image.expand(len(asked), -1, -1, -1), asked, layer)
            items.append(
                ExplainedImage(
                    sample_id=int(predictions.sample_ids[place]),
                    image=crop,
                    label=true,
                    confidence=float(softmax(predictions.logits[place])[predicted]),
                    maps=tuple(
                        ClassMap(label, overlay(crop, heat), not heat.any())
                        for label, heat in zip(asked.tolist(), maps, strict=True)
                    ),
                )
            )
            bar.update()
    return build_grad_cam(items, predictions.class_names, layer or "", grid, SEED)
