"""Layers of a network by name: which there are, which of them are meant, and what they put out.

Example:
    >>> layers = list_layers(model, images[:2])
    >>> chosen = choose_layers(layers, ["layer*", "penultimate"])
    >>> with LayerCapture(model, chosen, "mean") as capture:
    ...     model(images)
    ...     capture.features["layer4"].shape
    torch.Size([100, 512])
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.models.heads import final_layer, head_of

PENULTIMATE = "penultimate"  # what the last linear layer is given
ALL = "all"
MAX_LAYERS = 48  # of `all`: as many as a plot can name
Pooling = Literal["mean", "flatten"]


@dataclass(frozen=True)
class Layer:
    """A module with a tensor for output; `shape` is that of one image."""

    name: str
    kind: str
    shape: tuple[int, ...]
    storage: int = 0  # where its output lies: two layers with the same output are one


@torch.inference_mode()
def list_layers(model: nn.Module, images: Tensor) -> list[Layer]:
    """All layers whose output is a tensor, in the order of a pass; the last linear layer's input is
    `penultimate`.

    Args:
        images: normalised, (N, 3, H, W), N > 1, on the model's device.
    """
    layers: dict[str, Layer] = {}
    held: list[Tensor] = []  # an output that is freed would lend its place to another
    handles: list[RemovableHandle] = []

    def note(name: str, kind: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and tensor.ndim >= 2 and len(tensor) == len(images):
            held.append(tensor)
            layers.pop(name, None)  # a module that is called again counts with its last call
            layers[name] = Layer(name, kind, tuple(tensor.shape[1:]), tensor.data_ptr())

    def hook(name: str) -> Any:
        return lambda module, inputs, output: note(name, type(module).__name__, output)

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(hook(name)))
        last = _last_layer(model)
        if last is not None:
            handles.append(
                last.register_forward_pre_hook(
                    lambda module, inputs: note(PENULTIMATE, f"input of {type(module).__name__}", inputs)
                )
            )
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(layers.values())


def choose_layers(layers: Sequence[Layer], words: Sequence[str]) -> list[str]:
    """Names of the layers that are meant, in the order of a pass.

    Args:
        words: names, patterns (`blocks.*`), `penultimate`, or `all`: the model's parts and theirs, without
            those whose output is another's.

    Raises:
        ValueError: a word fits no layer; the nearest is named.
    """
    names = [layer.name for layer in layers]
    chosen: set[str] = set()
    for word in words:
        found = (
            _main_layers(layers) if word == ALL else [word] if word in names else fnmatch.filter(names, word)
        )
        if not found:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"the model has no layer {word[:80]!r}: {hint}--list-layers shows all of them")
        chosen |= set(found)
    return [name for name in names if name in chosen]


def _main_layers(layers: Sequence[Layer]) -> list[str]:
    """Layers at most one level inside the model, one an output: the shortest name, then the last one."""
    by_output: dict[tuple[int, int], Layer] = {}
    last_input = next((layer.storage for layer in layers if layer.name == PENULTIMATE), 0)
    for layer in layers:
        if layer.name.count(".") > 1 or layer.name == PENULTIMATE or layer.storage == last_input:
            continue
        size = int(torch.Size(layer.shape).numel())
        before = by_output.get((layer.storage, size))
        if before is None or layer.name.count(".") <= before.name.count("."):
            by_output[layer.storage, size] = layer
    kept = {layer.name for layer in by_output.values()}
    names = [layer.name for layer in layers if layer.name in kept]
    if len(names) > MAX_LAYERS:  # evenly spaced, the last one always among them
        step = (len(names) - 1) / (MAX_LAYERS - 1)
        names = [names[round(step * place)] for place in range(MAX_LAYERS)]
    if any(layer.name == PENULTIMATE for layer in layers):
        names.append(PENULTIMATE)
    return names


class LayerCapture:
    """Features of the named layers at each forward pass; a context manager that takes its hooks away again.

    Attributes:
        features: layer name → float32 (N, features) on the CPU, of the last pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], pooling: Pooling = "mean") -> None:
        self.features: dict[str, Tensor] = {}
        self._model, self._names, self._pooling = model, list(names), pooling
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCapture:
        modules = dict(self._model.named_modules())
        for name in self._names:
            if name == PENULTIMATE:
                last = _last_layer(self._model)
                assert last is not None
                self._handles.append(
                    last.register_forward_pre_hook(lambda module, inputs: self._keep(PENULTIMATE, inputs))
                )
            else:
                self._handles.append(modules[name].register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        return lambda module, inputs, output: self._keep(name, output)

    def _keep(self, name: str, output: Any) -> None:
        tensor = first_tensor(output)
        assert tensor is not None
        # At once, and as a copy: activations that work in place would change it.
        self.features[name] = pooled(tensor, self._pooling).float().cpu().clone()


def pooled(output: Tensor, pooling: Pooling) -> Tensor:
    """One row of features an image: (N, …) → (N, features).

    `mean` averages maps over their pixels and tokens over their number; channels may come first or last.
    """
    if output.ndim == 2 or pooling == "flatten":
        return output.flatten(1)
    if output.ndim == 3:  # (N, tokens, channels)
        return output.mean(1)
    if output.ndim == 4:
        # Images are square, so the two equal sides are the pixels: (N, H, W, C) in Swin and its kin.
        is_channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.mean((1, 2) if is_channels_last else (2, 3))
    return output.flatten(1)


def first_tensor(output: Any) -> Tensor | None:
    """The tensor a module returns, or the first one of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _last_layer(model: nn.Module) -> nn.Module | None:
    try:
        return final_layer(head_of(model)[0])
    except ValueError:
        return None
