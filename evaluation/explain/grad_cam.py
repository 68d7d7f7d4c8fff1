"""Grad-CAM: which parts of an image speak for a class, after the last map of features of a network.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017. The channels of a map are weighted by the mean gradient of the class's logit, summed, and what is
below zero is cut off. The map is as coarse as the layer's (often 7 × 7) and is enlarged linearly.

    maps = grad_cam(model, normalize(images), labels)            # (N, H, W) in [0, 1]
    picture = overlay(image, maps[0])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evaluation.explain.capture import captured_outputs, find_module, first_tensor
from evaluation.explain.feature_map import as_map, extra_tokens_of, find_layer

COLOUR_MAP = "inferno"  # perceptually uniform, and its lightness alone tells low from high
OPACITY = 0.5


def grad_cam(
    model: nn.Module, images: Tensor, labels: Tensor, layer: str | None = None
) -> NDArray[np.float32]:
    """Maps of what speaks for a class, each scaled to a maximum of 1.

    The model is left as it was: modes, gradients, hooks. Works inside `torch.no_grad` and
    `torch.inference_mode`, too.

    Args:
        images: normalised float (N, 3, H, W), on the model's device.
        labels: int64 (N,): the class of each image that is asked about.
        layer: name of a layer, as in `model.named_modules()`; None: the one that `choose_layer` finds.

    Returns:
        float32 (N, H, W) in [0, 1]; all zeros where nothing speaks for the class.

    Raises:
        ValueError: shapes or labels that do not fit, no such layer, or one without a map of features.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"Images must have the shape (N, 3, H, W), not {tuple(images.shape)}.")
    if labels.shape != (len(images),):
        raise ValueError(f"Labels must have the shape ({len(images)},), not {tuple(labels.shape)}.")
    with _for_gradients(model):
        batch, labels = images.detach().clone().requires_grad_(), labels.clone()  # no inference tensors
        if layer is None:
            layer = find_layer(model, batch[:1])
        features, gradients = _features_and_gradients(model, batch, labels, layer)
        weights = gradients.mean(dim=(2, 3), keepdim=True)
        maps = (weights * features).sum(dim=1, keepdim=True).relu()
        maps = functional.interpolate(maps.float(), images.shape[2:], mode="bilinear", align_corners=False)
        highest = maps.amax(dim=(2, 3), keepdim=True)
        return torch.where(highest > 0, maps / highest, 0.0)[:, 0].cpu().numpy().astype(np.float32)


def choose_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer that `grad_cam` takes by itself; images as there. Raises ValueError as there."""
    with _for_gradients(model):
        return find_layer(model, images[:1].detach().clone().requires_grad_())


def map_grid(model: nn.Module, images: Tensor, layer: str) -> tuple[int, int]:
    """Rows and columns of a layer's map, of images as in `grad_cam`. Raises ValueError as there."""
    with _for_gradients(model):
        batch, label = images[:1].detach().clone().requires_grad_(), torch.zeros(1, dtype=torch.int64)
        features, _ = _features_and_gradients(model, batch, label, layer)
    return features.shape[2], features.shape[3]


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image under a map of the same size: uint8 (H, W, 3); dark is low, bright is high."""
    from matplotlib import colormaps

    if image.shape != (*heat.shape, 3) or image.dtype != np.uint8:
        raise ValueError(f"A map of the shape {heat.shape} does not fit an image of {image.shape}.")
    colours = colormaps[COLOUR_MAP](heat)[..., :3]
    return np.rint((1 - OPACITY) * image + OPACITY * 255 * colours).astype(np.uint8)


def _features_and_gradients(
    model: nn.Module, batch: Tensor, labels: Tensor, layer: str
) -> tuple[Tensor, Tensor]:
    """The layer's map and the gradient of the labels' logits in it: (N, channels, rows, columns) each."""
    with captured_outputs({layer: find_module(model, layer)}) as outputs:
        # A copy: a network may change its input in place, which a leaf does not allow.
        logits = first_tensor(model(batch.clone()))
    assert logits is not None and logits.ndim == 2, "a classifier's logits are (N, classes)"
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"Labels must be from 0 to {logits.shape[1] - 1}, the classes of the model.")
    output = first_tensor(outputs[-1][1]) if outputs else None
    if output is None:
        raise ValueError(f"The layer {layer!r} takes no part in the forward pass: name another one.")
    extra, shape = extra_tokens_of(model), (batch.shape[2], batch.shape[3])
    features = as_map(output, shape, extra)
    if features is None or features.shape[2] * features.shape[3] < 2:
        raise ValueError(
            f"The layer {layer!r} puts out {tuple(output.shape)}, which is no map of features in the "
            "proportions of the image: name an earlier one, or none to have the last one that fits."
        )
    # Samples do not touch each other in evaluation mode: the gradient of the sum is that of each.
    score = logits.gather(1, labels[:, None].to(logits.device)).sum()
    (gradient,) = torch.autograd.grad(score, output, allow_unused=True)
    if gradient is None:
        raise ValueError(f"No class depends on the layer {layer!r}: name another one.")
    as_gradients = as_map(gradient, shape, extra)
    assert as_gradients is not None
    return features.detach(), as_gradients


@contextmanager
def _for_gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on whatever surrounds this; afterwards each module's own mode again.

    Gradients flow from the images, whether or not parameters need them, and `autograd.grad` stores none.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
