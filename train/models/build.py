"""Classifiers by name, from timm, torchvision or this project, with what the recipe changes in them.

Example:
    >>> model = build_model(ModelSection(name="resnet50", blurpool=True), num_classes=1000)
    >>> model.weights_note
    'random weights'
"""

from __future__ import annotations

import difflib

import torch
from torch import nn

from train.config import ModelSection
from train.models.activations import activation_fault, swap_activations
from train.models.blurpool import insert_blurpool
from train.models.constructors import build_plain
from train.models.gradient_checkpointing import checkpoint_blocks
from train.models.heads import replace_heads, set_dropout
from train.models.hub import Unavailable
from train.models.narrow_convs import avoid_narrow_strided_convs
from train.models.residual import init_last_norms, set_stochastic_depth
from train.models.weights import load_weights

OWN_MODELS = ("residual_cnn",)


def build_model(config: ModelSection, num_classes: int) -> nn.Module:
    """A classifier with `num_classes` outputs; input float NCHW.

    All that the section says, but for what needs a device: see `sync_batchnorm.convert_sync_batchnorm` and
    `compile`. The attribute `weights_note` is a sentence on where the weights come from, `weights_at_start` a
    word: `random`, `pretrained` or `checkpoint`. A dropout or stochastic depth of 0 leaves what the library
    has by default.

    Raises:
        ValueError: no such model, an option that it does not take, or weights that cannot be had.
    """
    if fault := model_fault(config):
        raise ValueError(fault)
    if config.pretrained == "if_available" and config.asks_hub:
        return _build_if_available(config, num_classes)
    model = build_plain(_without_hub(config) if not config.asks_hub else config, num_classes)
    if config.activation is not None:
        swap_activations(model, config.activation)
    _fit_heads(model, config, num_classes)
    if config.blurpool:
        insert_blurpool(model)
    if config.library == "torchvision":
        # timm's and our own constructors take these two.
        if config.dropout:
            set_dropout(model, config.dropout)
        if config.stochastic_depth:
            set_stochastic_depth(model, config.stochastic_depth)
    if config.zero_init_last_norm is not None:
        init_last_norms(model, config.zero_init_last_norm)
    note_weights(model, *_load(model, config))
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
        avoid_narrow_strided_convs(model)
    return model


def note_weights(model: nn.Module, weights_at_start: str, note: str) -> None:
    """Keep with the model where its weights come from: a word, and a sentence."""
    model.weights_at_start = weights_at_start  # type: ignore[assignment]
    model.weights_note = note  # type: ignore[assignment]


def _build_if_available(config: ModelSection, num_classes: int) -> nn.Module:
    """From the hub; or just as `pretrained: false` would be, with a note on why."""
    generator = torch.get_rng_state()
    try:
        return build_model(config.model_copy(update={"pretrained": True}), num_classes)
    except Unavailable as error:
        torch.set_rng_state(generator)
        model = build_model(_without_hub(config), num_classes)
        note_weights(model, "random", f"random weights, since pretrained ones cannot be had ({error.reason})")
        return model


def _without_hub(config: ModelSection) -> ModelSection:
    return config.model_copy(update={"pretrained": False})


def _fit_heads(model: nn.Module, config: ModelSection, num_classes: int) -> None:
    # torchvision's pretrained networks come with the classes of their weights; timm's with those asked for.
    if config.head is not None or (config.library == "torchvision" and config.asks_hub):
        replace_heads(model, num_classes, config.head)


def _load(model: nn.Module, config: ModelSection) -> tuple[str, str]:
    if config.checkpoint is not None:
        note = load_weights(model, config.checkpoint)
        if config.activation is not None:  # holds no weights: the file fits whatever it was trained with
            note += f"; every activation is {config.activation} here, whatever it was there"
        return "checkpoint", note
    if config.asks_hub:
        return "pretrained", f"pretrained weights of {config.library}'s {config.name}"
    return "random", "random weights"


def model_fault(config: ModelSection) -> str | None:
    """A sentence where the section names what does not exist, or contradicts itself; else None.

    Builds nothing: fit for a check of the recipe.
    """
    names = _model_names(config.library, config.name)
    if config.name not in names:
        near = difflib.get_close_matches(config.name, names, n=3)
        listing = "timm.list_models()" if config.library == "timm" else "torchvision.models.list_models()"
        hint = f"did you mean {' or '.join(near)}?" if near else f"list them with {listing}"
        if config.library == "own":
            hint = f"there is {' and '.join(OWN_MODELS)}"
        return f"model.name: {config.library} has no model {config.name[:80]!r}; {hint}"
    if config.library == "own" and config.pretrained:
        return "model.pretrained: the project's own networks have no pretrained weights; use model.checkpoint"
    if config.zero_init_last_norm is not None and (config.pretrained or config.checkpoint is not None):
        return "model.zero_init_last_norm: trained weights have norms of their own; leave it null"
    if config.head is not None and config.dropout:
        return "model.dropout is for the model's own head; with model.head, say model.head.dropout"
    if config.activation is not None and (fault := activation_fault(config.activation, "model.activation")):
        return fault
    if config.head is not None:
        return activation_fault(config.head.activation, "model.head.activation")
    return None


def _model_names(library: str, name: str) -> list[str]:
    if library == "own":
        return list(OWN_MODELS)
    if library == "timm":
        import timm

        # resnet50.a1_in1k is resnet50 with the weights of that name.
        return timm.list_pretrained() if "." in name else timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
