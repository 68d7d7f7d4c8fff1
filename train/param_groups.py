"""Which parameters are decayed, at which share of the rate each learns, and which learn at all.

Groups are told by the type of the module that owns a parameter, never by a pattern over names: `'bn' in name`
misses the BatchNorm of a shortcut. All parameters are grouped, frozen ones too, since a later phase of the
schedule may unfreeze them.

Example:
    >>> model = timm.create_model("resnet50", num_classes=10)
    >>> groups = build_groups(model, OptimizerSection(backbone_lr_fraction=0.1), head=[model.fc])
    >>> [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups]
    [(0.1, 0.0001, 53), (0.1, 0.0, 106), (1.0, 0.0001, 1), (1.0, 0.0, 1)]
    >>> set_trainable(model, "head", [model.fc])   # then freeze_statistics(model) after each model.train()
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from timm.layers import evo_norm, filter_response_norm, norm, norm_act
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from train.config import AnyPhase, OptimizerSection

Trainable = Literal["all", "head"] | tuple[str, ...]

# Of timm all modules of its norm files: some (RmsNorm, SimpleNorm, EvoNorm, …) derive from nn.Module alone.
NORMS: tuple[type[nn.Module], ...] = (
    _NormBase,  # BatchNorm, SyncBatchNorm, InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    *(
        kind
        for file in (norm, norm_act, evo_norm, filter_response_norm)
        for kind in vars(file).values()
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == file.__name__
    ),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def build_groups(
    model: nn.Module, config: OptimizerSection, head: Sequence[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Parameter groups with `weight_decay` and `lr_scale`; every parameter is in exactly one.

    Not decayed (unless `decay_norms_and_biases`): parameters of norm layers; biases; vectors and scalars,
    such as LayerScale's, also where they are stored as (C, 1, 1); and what timm's `model.no_weight_decay()`
    names, such as position embeddings.

    Args:
        head: the modules that classify: they learn at the full rate. The rest does at
            `backbone_lr_fraction`, or at `layer_decay` to the power of its distance from the head.

    Raises:
        ValueError: a fraction for the backbone, and nothing is known as the head.
    """
    head_ids = _ids(head)
    if config.backbone_lr_fraction != 1 and not head_ids:
        raise ValueError(
            "optimizer.backbone_lr_fraction: this model does not show which layers are its head: set it to 1"
        )
    undecayed = set() if config.decay_norms_and_biases else _undecayed_ids(model)
    depths = layer_depths(model) if config.layer_decay != 1 else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        key = id(parameter)
        decay = 0.0 if key in undecayed else config.weight_decay
        scale = config.backbone_lr_fraction * config.layer_decay ** depths.get(key, 0)
        scale = 1.0 if key in head_ids else scale
        group = groups.setdefault(
            (scale, decay), {"params": [], "weight_decay": decay, "lr_scale": float(scale)}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _undecayed_ids(model: nn.Module) -> set[int]:
    listed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    ids: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_bias = name == "bias" and hasattr(module, "weight")
            # A weight keeps its decay whatever its shape: that of a layer with one output is (1, C, 1, 1).
            is_vector = parameter.ndim <= 1 or (name != "weight" and parameter.squeeze().ndim <= 1)
            is_listed = f"{path}.{name}".removeprefix(".") in listed
            if isinstance(module, NORMS) or is_bias or is_vector or is_listed:
                ids.add(id(parameter))
    return ids


def layer_depths(model: nn.Module) -> dict[int, int]:
    """Parameter id → its distance from the head in layers, 0 for the last.

    timm's models say themselves what a layer is (`group_matcher`, as for its own layer decay, after BEiT:
    Bao et al., 2022); in others every block in the order of definition is one.
    """
    if hasattr(model, "group_matcher"):
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        last = max(layers.values())
        return {id(p): last - layers.get(name, last) for name, p in model.named_parameters()}
    blocks = list(_blocks(model, sum(p.numel() for p in model.parameters())))
    return {key: len(blocks) - 1 - position for position, block in enumerate(blocks) for key in block}


def _blocks(model: nn.Module, total: int) -> Iterator[set[int]]:
    """Ids of the parameters of each block; a norm belongs to the layer before it.

    Containers are opened, and so is a module that is most of the model, such as torchvision's `encoder`.
    """
    block: set[int] = {id(p) for p in model.parameters(recurse=False)}
    for part in _opened(model, total):
        ids = {id(p) for p in part.parameters()}
        if not ids or not block or isinstance(part, NORMS):
            block |= ids
            continue
        yield block
        block = ids
    yield block


def _opened(module: nn.Module, total: int) -> Iterator[nn.Module]:
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        has_own = any(True for _ in child.parameters(recurse=False))
        if any(True for _ in child.children()) and (type(child) in _CONTAINERS or size > total / 2):
            if has_own:
                yield _OwnParameters(child)
            yield from _opened(child, total)
        else:
            yield child


class _OwnParameters(nn.Module):
    """Those of a module that is opened, without its children's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def set_trainable(model: nn.Module, trainable: Trainable, head: Sequence[nn.Module] = ()) -> None:
    """Freeze all but what `trainable` names; gradients of what is frozen are dropped.

    Args:
        model: not wrapped for DDP, which must be wrapped anew afterwards.
        trainable: "all"; "head"; or names of modules, with all below them, as in `model.named_modules()`.
        head: the modules that classify.

    Raises:
        ValueError: there is no such module, or no parameter is left to train.
    """
    wanted = _trainable_ids(model, trainable, head)
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in wanted
        if not parameter.requires_grad:
            parameter.grad = None


def _trainable_ids(model: nn.Module, trainable: Trainable, head: Sequence[nn.Module]) -> set[int]:
    if trainable == "all":
        return _ids([model])
    if trainable == "head":
        if not _ids(head):
            raise ValueError("trainable: head: this model shows no head of its own; name its modules instead")
        return _ids(head)
    modules = dict(model.named_modules())
    for name in trainable:
        if name not in modules or not name:
            near = difflib.get_close_matches(name, [n for n in modules if n], n=3, cutoff=0.4)
            children = ", ".join(child for child, _ in model.named_children())
            hint = f"did you mean {' or '.join(near)}?" if near else f"at the top there are {children}"
            raise ValueError(f"trainable: the model has no module {name!r}; {hint}")
    ids = _ids(modules[name] for name in trainable)
    if not ids:
        raise ValueError(f"trainable: {', '.join(trainable) or '[]'} has no parameters: name other modules")
    return ids


def trainable_fault(model: nn.Module, head: Sequence[nn.Module], phases: Sequence[AnyPhase]) -> str | None:
    """A sentence where a phase wants to train what the model does not have, else None; changes nothing."""
    for position, phase in enumerate(phases):
        try:
            _trainable_ids(model, phase.trainable, head)
        except ValueError as error:
            return f"schedule.phases.{position}.{error}"
    return None


def freeze_statistics(model: nn.Module) -> None:
    """Put BatchNorms whose own parameters are all frozen into evaluation mode; call after `model.train()`.

    Otherwise the running statistics of a frozen backbone drift towards the new data while its weights, which
    were trained with the old ones, stay: the usual way to lose what a pretrained model knows. A BatchNorm
    without parameters follows the module that it is part of.
    """
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, _BatchNorm):
                own = list(child.parameters(recurse=False)) or list(parent.parameters())
                if own and not any(parameter.requires_grad for parameter in own):
                    child.eval()
