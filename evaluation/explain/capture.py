"""What modules put out during a forward pass, by hooks that are gone afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def captured_outputs(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Any]]]:
    """A list that fills with (name, output), in the order in which modules finish, as long as this is open.

    Outputs are kept as they are, with their graph; a module that is called twice is there twice.
    """
    outputs: list[tuple[str, Any]] = []
    handles = [
        # The name is bound here, not when the hook is called.
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.append((name, output))
        )
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the model by its name, but for the model itself."""
    return {name: module for name, module in model.named_modules() if name}


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of this name.

    Raises ValueError, with the nearest names, where there is none.
    """
    layers = named_layers(model)
    if name in layers:
        return layers[name]
    near = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    top_level = ", ".join(child for child, _ in model.named_children())
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"its parts are {top_level}, and what is in them."
    )
    raise ValueError(f"{type(model).__name__} has no layer {name[:80]!r}: {hint}")


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a module put out, or the first of several; None for anything else."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None
