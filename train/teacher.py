"""The teacher of knowledge distillation: a trained checkpoint that says what it sees in the same images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from train.checkpoint import content_fault, load_checkpoint, missing_keys
from train.config import parse_recipe
from train.data.batch import Normalize, normalization_statistics
from train.models.build import build_model


class Teacher:
    """A frozen model with a normalisation of its own.

    Args:
        path: a checkpoint file or run folder.
        class_names: of the student's data, in the order of the labels.

    Raises:
        ValueError: no whole checkpoint, or one of other classes.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...], device: torch.device) -> None:
        self.model, self.normalize = load_frozen(path, class_names, device)

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits for augmented images, NHWC with values 0–255: shape (n, classes)."""
        return self.model(self.normalize(pixels))


def load_frozen(
    path: Path, class_names: tuple[str, ...], device: torch.device
) -> tuple[nn.Module, Normalize]:
    """Model and normalisation of a checkpoint, in evaluation mode and without gradients."""
    state = load_checkpoint(path)
    if missing := missing_keys(state):
        raise ValueError(f"the teacher {path} is not a complete checkpoint: it lacks {', '.join(missing)}")
    if fault := content_fault(state):
        raise ValueError(f"the teacher {path} is not a checkpoint of this project: {fault}")
    if tuple(state["class_names"]) != class_names:
        raise ValueError(
            f"the teacher {path} was trained on other classes: loss.distillation.teacher needs the same ones"
        )
    try:
        recipe = parse_recipe(state["recipe"])
    except ValueError:
        raise ValueError(f"the recipe inside {path} is of another version of this project") from None
    config = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = build_model(config, len(class_names)).to(device)
    model.load_state_dict(state["ema" if state.get("headline_weights") == "ema" else "model"])
    statistics = normalization_statistics(
        recipe.data.normalization, tuple(state["mean"]), tuple(state["std"])
    )
    normalize = Normalize(*statistics, channels_last=config.channels_last).to(device)
    return model.eval().requires_grad_(False), normalize
