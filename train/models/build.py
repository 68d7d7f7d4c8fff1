"""Classifiers by name, from timm or torchvision."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from train.config import ModelSection


def build_model(config: ModelSection, num_classes: int) -> nn.Module:
    """A classifier with `num_classes` outputs; input float NCHW.

    Raises:
        ValueError: no such model, or its pretrained weights cannot be had; names the nearest.
    """
    if fault := model_fault(config):
        raise ValueError(fault)
    if config.library == "timm":
        model = _from_timm(config, num_classes)
    else:
        model = _from_torchvision(config, num_classes)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def model_fault(config: ModelSection) -> str | None:
    """A sentence where the library has no model of this name, else None."""
    names = _model_names(config.library)
    if config.name in names:
        return None
    near = difflib.get_close_matches(config.name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "list them with timm.list_models()"
    return f"model.name: {config.library} has no model {config.name!r}; {hint}"


def _model_names(library: str) -> list[str]:
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _from_timm(config: ModelSection, num_classes: int) -> nn.Module:
    import timm

    try:
        return timm.create_model(config.name, pretrained=config.pretrained, num_classes=num_classes)
    except Exception as error:
        if not config.pretrained:
            raise
        raise ValueError(_no_weights(config, error)) from None


def _from_torchvision(config: ModelSection, num_classes: int) -> nn.Module:
    import torchvision

    if not config.pretrained:
        return torchvision.models.get_model(config.name, num_classes=num_classes)
    try:
        # The weights fix the number of classes; the last layer is replaced afterwards.
        model = torchvision.models.get_model(config.name, weights="DEFAULT")
    except Exception as error:
        raise ValueError(_no_weights(config, error)) from None
    name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.Linear(layer.in_features, num_classes))
    return model


def _no_weights(config: ModelSection, error: Exception) -> str:
    first_line = str(error).split("\n")[0][:200]
    return (
        f"pretrained weights of {config.library}'s {config.name} cannot be had ({first_line}): check the "
        "network, or set model.pretrained=false"
    )


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
