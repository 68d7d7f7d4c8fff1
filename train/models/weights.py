"""Weights from a file: safetensors, a torch state dict, or a checkpoint of this project.

A file may come from anybody: pickles are read with `weights_only=True`, which runs no code. Everything but
the classifier heads must fit by name and shape; a head of another shape stays as it is, and the sentence says
so.

Example:
    >>> load_weights(model, Path("runs/x"))
    'weights of 318 tensors from runs/x; head (2 tensors) starts at random: 1000 classes there, 40 here'
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train.checkpoint import MANIFEST_NAME, UnsafeFile, load_checkpoint, read_torch_file
from train.models.heads import AUXILIARY_NAMES, final_layer, head_of

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # in timm's order: averages are better
_PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile
MAX_NAMED_KEYS = 3


def load_weights(model: nn.Module, path: Path) -> str:
    """Load weights into the model.

    Args:
        path: .safetensors, .pt or .pth; or a run folder (its best checkpoint).

    Returns:
        A sentence on what came from where, and what did not.

    Raises:
        ValueError: unreadable, unsafe, or of another model; the model is then as it was.
    """
    found = read_weights(path)
    wanted = model.state_dict()
    heads = _head_prefixes(model)
    random: dict[str, int] = {}  # head → tensors that stay as they are
    for prefix in heads:
        inside = {key for key in wanted if key.startswith(prefix)}
        offered = {key for key in found if key.startswith(prefix)}
        if inside != offered or any(found[key].shape != wanted[key].shape for key in inside):
            random[prefix] = len(inside)
    ignored = (*random, *(f"{name}." for name in AUXILIARY_NAMES if f"{name}." not in heads))
    backbone = {key: value for key, value in found.items() if not key.startswith(ignored)}
    expected = {key: value for key, value in wanted.items() if not key.startswith(tuple(random))}
    if fault := _mismatch(backbone, expected, set(found)):
        raise ValueError(f"{path} holds weights of another model than {type(model).__name__}: {fault}")
    model.load_state_dict(backbone, strict=False)
    return _describe(path, len(backbone), random, found, model)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name → tensor of a weights file, on the CPU, without what training wrappers put around it.

    Raises:
        ValueError: missing, truncated, unsafe, or without weights.
    """
    if path.is_dir():
        state: Any = load_checkpoint(path)
    elif not path.is_file():
        raise ValueError(f"model.checkpoint: {path} does not exist")
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.parent.name == "checkpoints" and (path.parent / MANIFEST_NAME).is_file():
        state = load_checkpoint(path)  # by its checksum
    else:
        state = _read_torch(path)
    weights = _plain(_choose(state, path))
    if weights is None:
        raise ValueError(f"{path} holds no weights: a mapping from names to tensors, possibly under one of "
                         f"{', '.join(_WRAPPERS)}")  # fmt: skip
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # its own kind, which it does not export everywhere
        raise ValueError(f"{path} is truncated or no safetensors file ({_reason(error)})") from None


def _read_torch(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except UnsafeFile as error:
        raise ValueError(f"{path} is truncated, or holds more than plain weights ({error})") from None


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:150] or type(error).__name__


def _choose(state: Any, path: Path) -> Any:
    """The weights inside a checkpoint; of this project's those that made its headline."""
    if not isinstance(state, Mapping):
        return None
    if "class_names" in state and "optimizer" in state:  # this project's
        weights, average = state.get("model"), state.get("ema")
        if state.get("headline_weights") != "ema" or average is None:
            return weights
        plain, averaged = _plain(weights), _plain(_unwrap(average))
        if plain is None or averaged is None:
            raise ValueError(f"{path} holds no averaged weights, though its headline is theirs")
        return {**plain, **{key: value for key, value in averaged.items() if key in plain}}
    return _unwrap(state)


def _unwrap(state: Any) -> Any:
    if isinstance(state, Mapping):
        for name in (*_WRAPPERS, "weights"):
            if isinstance(state.get(name), Mapping):
                return state[name]
    return state


def _plain(state: Any) -> dict[str, Tensor] | None:
    """Without prefixes of wrappers; None where it is no mapping from names to tensors."""
    if not isinstance(state, Mapping) or not state:
        return None
    weights = {key: value for key, value in state.items() if key != "n_averaged"}  # of torch's AveragedModel
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        return None
    while weights:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights or None


def _head_prefixes(model: nn.Module) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(head)]}." for head in head_of(model)]


def _mismatch(found: dict[str, Tensor], expected: dict[str, Tensor], all_found: set[str]) -> str | None:
    # Older files lack BatchNorm's count of batches, which holds no weight.
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} ({_shape(found[key])} there, {_shape(expected[key])} here)"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    parts = [
        f"{len(keys)} {kind}, e.g. {', '.join(key[:100] for key in keys[:MAX_NAMED_KEYS])}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    return "; ".join(parts) or None


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _describe(
    path: Path, num_loaded: int, random: dict[str, int], found: dict[str, Tensor], model: nn.Module
) -> str:
    sentence = f"weights of {num_loaded} tensors from {path}"
    if not random:
        return sentence
    here = final_layer(head_of(model)[0]).weight.shape[0]
    prefix = _head_prefixes(model)[0]
    matrices = [v for k, v in found.items() if k.startswith(prefix) and v.ndim > 1]
    if not matrices:
        why = "no such head there"
    elif matrices[-1].shape[0] != here:
        why = f"{matrices[-1].shape[0]} classes there, {here} here"
    else:
        why = "another head there"
    return f"{sentence}; head ({sum(random.values())} tensors) starts at random: {why}"
