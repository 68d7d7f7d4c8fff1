"""Feature maps of any classifier in one shape, and the layer that has the last of them.

Networks hand on (N, channels, height, width), (N, height, width, channels) (timm's Swin) or tokens
(N, tokens, channels) (ViT), of which the first ones may be class tokens and belong to no place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evaluation.explain.capture import captured_outputs, first_tensor, named_layers

MAX_EXTRA_TOKENS = 8  # class, distillation and register tokens before those of places


def as_map(
    output: Tensor, image_shape: tuple[int, int], num_extra_tokens: int | None = None
) -> Tensor | None:
    """A view of a layer's output as (N, channels, rows, columns), or None where it has no places.

    Args:
        image_shape: height and width of the images, whose proportions tell where the channels are.
        num_extra_tokens: of the model, where it is known; else the smallest number is taken that leaves a
            grid of the image's proportions.
    """
    height, width = image_shape
    if output.ndim == 4:
        _, second, third, last = output.shape
        if _fits(third, last, height, width):
            return output
        return output.permute(0, 3, 1, 2) if _fits(second, third, height, width) else None
    if output.ndim != 3:
        return None
    num_tokens = output.shape[1]
    extras = range(MAX_EXTRA_TOKENS + 1) if num_extra_tokens is None else [num_extra_tokens]
    for extra in extras:
        rows = math.isqrt(max(0, (num_tokens - extra) * height // width))
        if rows < 2 or (num_tokens - extra) % rows:
            continue
        columns = (num_tokens - extra) // rows
        if _fits(rows, columns, height, width):
            return output[:, extra:].transpose(1, 2).unflatten(2, (rows, columns))
    return None


def find_layer(model: nn.Module, image: Tensor) -> str:
    """The name of the last layer whose map of features, larger than 1 × 1, the largest logit depends on.

    Found by a forward pass of one image and the gradients of its result, so that no list of architectures
    is needed: before the pooling of a convolutional network, and in a vision transformer with a class token
    the last place where the other tokens still count. The model must be in evaluation mode.

    Args:
        image: normalised float (1, 3, height, width) that requires a gradient.

    Raises:
        ValueError: no layer has a map.
    """
    layers = {name: module for name, module in named_layers(model).items() if not _is_passing(module)}
    with captured_outputs(layers) as outputs:
        logits = first_tensor(model(image.clone()))
    assert logits is not None
    extra, shape = extra_tokens_of(model), (image.shape[2], image.shape[3])
    maps = []
    for name, output in outputs:
        tensor = first_tensor(output)
        if tensor is None or not tensor.requires_grad:
            continue
        features = as_map(tensor, shape, extra)
        # What a linear layer makes of tokens (queries, keys, hidden units) is a step inside of a block.
        is_inside = tensor.ndim == 3 and isinstance(layers[name], nn.Linear)
        if features is not None and features.shape[2] * features.shape[3] > 1 and not is_inside:
            maps.append((name, tensor))
    tensors = [tensor for _, tensor in maps]
    gradients = torch.autograd.grad(logits.max(), tensors, allow_unused=True) if maps else ()
    # None: of a layer beside the way to the logits.
    used = [
        (name, gradient) for (name, _), gradient in zip(maps, gradients, strict=True) if gradient is not None
    ]
    # No gradient at places: of a layer after which only the class token is used.
    counting = [name for name, gradient in used if as_map(gradient, shape, extra).any()]  # type: ignore[union-attr]
    if used:
        return (
            counting[-1] if counting else used[-1][0]
        )  # a head that starts with zeros has no gradient at all
    raise ValueError(
        f"{type(model).__name__} has no layer with a map of features at {shape[0]} × {shape[1]} pixels: "
        "Grad-CAM needs images that are larger, or a network with places (convolutions or tokens); "
        "--grad-cam-layer names a layer."
    )


def extra_tokens_of(model: nn.Module) -> int | None:
    """How many tokens of this model belong to no place, where it says so (timm does)."""
    number = getattr(model, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def _fits(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a grid has the proportions of the image, but for rounding to whole cells."""
    return abs(rows * width - columns * height) < max(height, width)


def _is_passing(module: nn.Module) -> bool:
    """Pools, or makes nothing of its own."""
    # Of a pooled map that is still 7 × 7 (VGG), what is before it shows more.
    pools = "Pool" in type(module).__name__ and not any(module.parameters())
    return pools or isinstance(module, nn.Identity | nn.Softmax | nn.modules.dropout._DropoutNd)
