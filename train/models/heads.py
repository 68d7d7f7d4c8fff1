"""Classifier heads: where a model's last layers are, and what may stand in their place.

A model has a main head and, in torchvision's Inception-v3 and GoogLeNet, auxiliary ones that see earlier
features and are used in training only.

Example:
    >>> replace_heads(model, 40, HeadSection(hidden=(512, 128), dropout=0.5))
    >>> logits, auxiliary = split_outputs(model(images))
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from train.config import HeadSection
from train.models.activations import build_activation
from train.models.specialize import specialize

AUXILIARY_NAMES = ("AuxLogits", "aux1", "aux2")  # torchvision's
_MAIN_NAMES = ("fc", "classifier", "head", "heads")  # torchvision's and the project's own


class Head(nn.Sequential):
    """Dropout, linear, activation, …, dropout, linear; marks a head that this project put in place."""


def split_outputs(output: Any) -> tuple[Tensor, list[Tensor]]:
    """Main logits and auxiliary logits of what a model returns, each (N, classes).

    Raises:
        ValueError: it is neither a tensor nor a tuple that begins with one.
    """
    if isinstance(output, Tensor):
        return output, []
    # A named tuple is a tuple, with None for an auxiliary head that is switched off.
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        rest = [entry for entry in output[1:] if entry is not None]
        if all(isinstance(entry, Tensor) for entry in rest):
            return output[0], rest
    raise ValueError(f"the model returns {type(output).__name__}, which holds no class scores")


def head_of(model: nn.Module) -> list[nn.Module]:
    """The classifier heads, the main one first: last layers or what replaced them, and auxiliary ones.

    Raises:
        ValueError: none can be found.
    """
    heads = _main_heads(model)
    for name in AUXILIARY_NAMES:
        auxiliary = getattr(model, name, None)
        if isinstance(auxiliary, nn.Module):
            heads.append(auxiliary)
    if not heads:
        raise ValueError(f"{type(model).__name__} has no classifier head that could be found")
    return heads


def _main_heads(model: nn.Module) -> list[nn.Module]:
    if hasattr(model, "get_classifier"):  # timm; distilled models have two
        classifier: Any = model.get_classifier()  # type: ignore[operator]
        return [head for head in _parts(classifier) if _final_layers(head)]
    for name in _MAIN_NAMES:
        classifier = getattr(model, name, None)
        if not isinstance(classifier, nn.Module):
            continue
        if isinstance(classifier, nn.Sequential) and not isinstance(classifier, Head):
            # The library's dropout, norms, pooling and hidden layers come before the last one.
            return [child for child in classifier if _final_layers(child)][-1:]
        return [classifier]
    return []


def _parts(classifier: Any) -> list[nn.Module]:
    """timm's classifiers one by one: distilled and two-branch models have several."""
    if isinstance(classifier, tuple | list | nn.ModuleList):
        return [head for part in classifier for head in _parts(part)]
    if isinstance(getattr(classifier, "head_dist", None), nn.Module):  # RepViT's
        return [*_parts(classifier.head), *_parts(classifier.head_dist)]
    return [classifier] if isinstance(classifier, nn.Module) else []


def _final_layers(head: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers and convolutions of a head by name, in order; the last one gives the class scores."""
    return [(name, m) for name, m in head.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def final_layer(head: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer of a head that gives the class scores.

    Raises:
        ValueError: it has none.
    """
    layers = _final_layers(head)
    if not layers:
        raise ValueError(f"{type(head).__name__} has no linear layer that gives class scores")
    return layers[-1][1]  # type: ignore[return-value]


def replace_heads(model: nn.Module, num_classes: int, section: HeadSection | None) -> None:
    """New last layers with `num_classes` outputs; those of the main head as `section` says.

    Auxiliary heads get a new last layer only: hidden layers of their own are part of their design.

    Raises:
        ValueError: the model has no head that could be replaced, or the activation is unknown.
    """
    main = _main_heads(model)
    for head in head_of(model):
        layer = final_layer(head)
        new: nn.Module
        if section is not None and any(head is one for one in main):
            new = build_head(section, layer, num_classes)
        else:
            new = _like(layer, num_features(layer), num_classes, bias=layer.bias is not None)
        _put(model, layer, new)
    if hasattr(model, "num_classes"):
        model.num_classes = num_classes  # type: ignore[assignment]


def build_head(section: HeadSection, old: nn.Linear | nn.Conv2d, num_classes: int) -> Head:
    """Dropout, linear, activation, …, dropout, linear in place of `old`, with its number of features.

    Where the model's last layer is a 1×1 convolution, so are these.

    Raises:
        ValueError: unknown activation.
    """
    widths = [num_features(old), *section.hidden, num_classes]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        if index:
            layers.append(build_activation(section.activation, "model.head.activation", inplace=True))
        if section.dropout:
            layers.append(nn.Dropout(section.dropout))
        layers.append(_like(old, inputs, outputs, bias=True))
    return Head(*layers)


def num_features(layer: nn.Linear | nn.Conv2d) -> int:
    """Inputs of a last layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _like(old: nn.Linear | nn.Conv2d, inputs: int, outputs: int, bias: bool) -> nn.Module:
    device, dtype = old.weight.device, old.weight.dtype
    if isinstance(old, nn.Linear):
        return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)
    return nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Dropout before the last layer of a torchvision model.

    Dropout layers that its classifier has get this probability; where it has none, one is put before the last
    layer, without a new key in the state dict.
    """
    head = _main_heads(model)[0]
    owner = next((m for m in model.modules() if any(child is head for child in m.children())), model)
    # `dropout` of Inception-v3 and GoogLeNet stands beside the head, the others' inside the same Sequential.
    beside = [child for child in owner.children() if isinstance(child, nn.Dropout)]
    for layer in beside:
        layer.p = probability
    if not beside:
        head.dropout_probability = probability  # type: ignore[assignment]
        specialize(head, _DropoutBefore)


class _DropoutBefore(nn.Module):
    """A last layer that drops out its input."""

    def forward(self, features: Tensor) -> Tensor:
        probability: float = self.dropout_probability  # type: ignore[assignment]
        return super().forward(nn.functional.dropout(features, probability, self.training))


def init_bce_bias(model: nn.Module, num_classes: int) -> None:
    """Bias of every last layer at -log(classes), for binary cross-entropy (MosaicML's ResNet recipe, 2022).

    The first probabilities are then near 1/classes, and so is the loss of the many negatives.

    Raises:
        ValueError: a last layer has no bias.
    """
    for head in head_of(model):
        layer = final_layer(head)
        if layer.bias is None:
            raise ValueError(
                f"loss.kind bce: the last layer of {type(model).__name__} has no bias to start at "
                "-log(classes); set model.head to {} for one that has"
            )
        with torch.no_grad():
            layer.bias.fill_(-math.log(num_classes))
