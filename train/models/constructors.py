"""Networks as their library makes them, from the options that its constructor takes.

An option that is not taken is an error. Some constructors swallow any keyword without a word (torchvision's
ConvNeXt and MobileNetV3, timm's MetaFormer and HRNet): they are checked by their signature.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from typing import Any

from torch import nn

from train.config import ModelSection
from train.models.hub import Unavailable, prepared_hub
from train.models.residual_cnn import ResidualCnn

_RESERVED = {
    "num_classes": "the data has them",
    "pretrained": "say model.pretrained",
    "weights": "say model.pretrained or model.checkpoint",
    "checkpoint_path": "say model.checkpoint",
    "drop_rate": "say model.dropout",
    "drop_path_rate": "say model.stochastic_depth",
    "stochastic_depth_prob": "say model.stochastic_depth",
    "stochastic_depth": "say model.stochastic_depth",
    "dropout": "say model.dropout",
}
# What builder functions take out before the class sees it.
_BUILDER_OPTIONS = {"width_mult", "reduced_tail", "dilated"}


def build_plain(config: ModelSection, num_classes: int) -> nn.Module:
    """The network of this name, with the constructor's options, and the hub's weights where `pretrained`.

    timm's and our own with dropout and stochastic depth, torchvision's without; torchvision's pretrained ones
    with the number of classes of the weights.

    Raises:
        ValueError: an option that the constructor does not take. Unavailable: weights that cannot be had.
    """
    if reserved := next((name for name in config.options if name in _RESERVED), None):
        raise ValueError(f"model.options: {reserved} has a place of its own: {_RESERVED[reserved]}")
    build = {"timm": _build_timm, "torchvision": _build_torchvision, "own": _build_own}[config.library]
    hub = prepared_hub(config) if config.pretrained else contextlib.nullcontext()
    with warnings.catch_warnings(), hub:
        warnings.simplefilter("ignore")  # of libraries, about their defaults
        model = build(config, num_classes)
    for option in config.options:
        if _is_swallowed(type(model), option):
            raise ValueError(_not_taken(config, option))
    return model


def _build_timm(config: ModelSection, num_classes: int) -> nn.Module:
    import timm

    rates = {}
    if config.dropout:
        rates["drop_rate"] = config.dropout
    if config.stochastic_depth:
        rates["drop_path_rate"] = config.stochastic_depth
    options = {**config.options, **rates}
    model = _construct(
        config, timm.create_model, pretrained=config.pretrained, num_classes=num_classes, **options
    )
    if config.dropout and not _has_dropout(model, config.dropout):
        raise ValueError(f"model.dropout: timm's {config.name} takes none; set it to 0, or say model.head")
    if config.stochastic_depth and not _has_drop_path(model):
        raise ValueError(f"model.stochastic_depth: timm's {config.name} takes none; set it to 0")
    return model


def _build_torchvision(config: ModelSection, num_classes: int) -> nn.Module:
    import torchvision

    options = dict(config.options)
    if config.name in ("inception_v3", "googlenet"):
        # The library turns it on with its weights; then a run that goes on, or its evaluation, which have
        # none from there, would see other pixels.
        options.setdefault("transform_input", False)
    if not config.pretrained:
        return _construct(config, torchvision.models.get_model, num_classes=num_classes, **options)
    if config.name == "googlenet":
        options.setdefault("aux_logits", True)  # else the auxiliary heads are taken away after loading
    return _construct(config, torchvision.models.get_model, weights="DEFAULT", **options)


def _build_own(config: ModelSection, num_classes: int) -> nn.Module:
    options: dict[str, Any] = dict(config.options)
    options.update(dropout=config.dropout, stochastic_depth=config.stochastic_depth)
    try:
        inspect.signature(ResidualCnn).bind(num_classes, **options)
    except TypeError as error:
        raise ValueError(_from_type_error(config, error)) from None
    return ResidualCnn(num_classes, **options)


def _construct(config: ModelSection, build: Any, **options: Any) -> nn.Module:
    try:
        return build(config.name, **options)
    except TypeError as error:
        if not config.options and "drop" not in str(error):
            raise
        raise ValueError(_from_type_error(config, error)) from None
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        if config.pretrained:
            raise Unavailable(config, reason) from None
        if config.options:
            raise ValueError(
                f"model.options: {config.library}'s {config.name} refuses them ({reason})"
            ) from None
        raise


def _from_type_error(config: ModelSection, error: TypeError) -> str:
    match = re.search(r"unexpected keyword argument '([^']*)'", str(error))
    if match is None:
        return f"model.options: {config.library}'s {config.name} refuses them ({str(error)[:150]})"
    named = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth"}.get(match[1])
    if named is not None:
        return f"model.{named}: {config.library}'s {config.name} takes none; set it to 0"
    return _not_taken(config, match[1])


def _not_taken(config: ModelSection, option: str) -> str:
    return f"model.options: {config.library}'s {config.name} takes no option {option[:80]!r}"


def _is_swallowed(kind: type[nn.Module], option: str) -> bool:
    parameters = inspect.signature(kind.__init__).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return False
    if "cfg" in parameters and kind.__name__ != "HighResolutionNet":
        return False  # timm's: the rest changes the configuration, which refuses unknown fields
    return option not in parameters and option not in _BUILDER_OPTIONS


def _has_dropout(model: nn.Module, rate: float) -> bool:
    return any(
        getattr(module, "drop_rate", None) == rate or (isinstance(module, nn.Dropout) and module.p == rate)
        for module in model.modules()
    )


def _has_drop_path(model: nn.Module) -> bool:
    return any((getattr(module, "drop_prob", 0.0) or 0.0) > 0 for module in model.modules())
