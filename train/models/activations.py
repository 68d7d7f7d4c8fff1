"""One activation in place of every other in a network.

Modules are swapped wherever they are, those inside timm's fused BatchNormAct2d included. Gates (sigmoid,
hardsigmoid, tanh: squeeze-and-excitation, attention) are no activations in this sense and stay. Torchvision's
Inception-v3, GoogLeNet and DenseNet call ReLU as a function; their blocks get a module in its place. Any
other model that does so is refused: a swap that leaves half of the network as it was would be a lie.
"""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.specialize import specialize

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "swish": nn.SiLU,
}
# Their backward pass needs only the output: overwriting the input is free. The others would copy it first.
_OVERWRITING = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_TIMM_ACTIVATIONS = (
    "Swish", "SwishMe", "Mish", "MishMe", "HardSwish", "HardSwishMe", "HardMish", "HardMishMe",
    "PReLU", "GELU", "GELUTanh", "QuickGELU",
)  # fmt: skip
_FUNCTIONS = (
    r"(?:relu6?|leaky_relu|r?relu_|prelu|c?elu|selu|gelu|silu|swish|mish|hardswish|hard_swish|softplus)"
)
_CALL = re.compile(rf"\b(?:F|torch|functional)\.{_FUNCTIONS}\(")


def activation_fault(name: str, key: str) -> str | None:
    """A sentence where there is no activation of this name, else None; `key` is where the recipe says it."""
    if name in ACTIVATIONS:
        return None
    near = difflib.get_close_matches(name, ACTIVATIONS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(ACTIVATIONS)}"
    return f"{key}: there is no activation {name[:40]!r}; {hint}"


def build_activation(name: str, key: str = "model.activation", inplace: bool = False) -> nn.Module:
    """The activation of this name.

    Args:
        inplace: may overwrite its input; heeded where that saves memory.

    Raises:
        ValueError: unknown; names the nearest.
    """
    if fault := activation_fault(name, key):
        raise ValueError(fault)
    kind = ACTIVATIONS[name]
    return kind(inplace=True) if inplace and issubclass(kind, _OVERWRITING) else kind()


def swap_activations(model: nn.Module, name: str) -> int:
    """Put the named activation in place of every other one; how many modules were swapped.

    Raises:
        ValueError: unknown name, or the model calls its activation as a function, or has none.
    """
    if fault := activation_fault(name, "model.activation"):
        raise ValueError(fault)
    found = sum(_make_swappable(module) for module in list(model.modules()))
    if caller := _calls_a_function(model):
        raise ValueError(
            f"model.activation: {type(model).__name__} calls its activation as a function (in {caller}), "
            "where it cannot be swapped; leave it null or choose another model"
        )
    swapped: dict[int, nn.Module] = {}  # one module that stands in several places stays one
    for parent in list(model.modules()):
        for child_name, child in parent.named_children():
            if is_activation(child):
                if id(child) not in swapped:
                    swapped[id(child)] = _successor(child, name)
                setattr(parent, child_name, swapped[id(child)])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.inplace = False  # would spoil the output that a ReLU in place of a Hardswish needs
    if not swapped and not found:
        raise ValueError(f"model.activation: {type(model).__name__} has no activation that could be swapped")
    return len(swapped)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation, of torch or of timm; gates are not."""
    if isinstance(module, tuple(ACTIVATIONS.values())):
        return True
    kind = type(module)
    return kind.__module__.startswith("timm.layers.activations") and kind.__name__ in _TIMM_ACTIVATIONS


def _successor(old: nn.Module, name: str) -> nn.Module:
    # Only where one stood that needs its output as well: what comes next then lets the output be.
    inplace = isinstance(old, _OVERWRITING) and old.inplace
    new = build_activation(name, inplace=inplace)
    return new.train(old.training)


def _make_swappable(module: nn.Module) -> bool:
    """Give torchvision's blocks that call ReLU as a function a module for it."""
    from torchvision.models import densenet, inception
    from torchvision.models.googlenet import BasicConv2d, InceptionAux

    behaviours: dict[type[nn.Module], type[nn.Module]] = {
        inception.BasicConv2d: _ActivatedConv,
        BasicConv2d: _ActivatedConv,
        InceptionAux: _ActivatedAux,
        densenet.DenseNet: _ActivatedDenseNet,
    }
    behaviour = behaviours.get(type(module))
    if behaviour is None:
        return False
    module.activation = nn.ReLU(inplace=True)
    specialize(module, behaviour)
    return True


class _ActivatedConv(nn.Module):
    """Of Inception-v3 and GoogLeNet: convolution, BatchNorm, activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class _ActivatedAux(nn.Module):
    """GoogLeNet's auxiliary classifier."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))
        x = self.activation(self.fc1(torch.flatten(x, 1)))
        return self.fc2(self.dropout(x))


class _ActivatedDenseNet(nn.Module):
    """DenseNet's last activation, before pooling."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.activation(self.features(x))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def _calls_a_function(model: nn.Module) -> str | None:
    """The name of a class in the model that computes an activation without a module."""
    for kind in {type(module): None for module in model.modules()}:
        if kind.__module__.startswith(("torch.", "timm.layers.activations")):
            continue  # activations themselves, and layers without any
        # Only methods that are in force: an overridden forward does not run.
        methods = {
            name: getattr(kind, name) for name in dir(kind) if name.startswith(("forward", "_forward"))
        }
        for method in methods.values():
            if inspect.isfunction(method) and _CALL.search(_source(method)):
                return kind.__name__
    for module in model.modules():
        for value in vars(module).values():
            if callable(value) and re.fullmatch(_FUNCTIONS, getattr(value, "__name__", "")):
                return type(module).__name__
    return None


def _source(function: object) -> str:
    try:
        return inspect.getsource(function)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
