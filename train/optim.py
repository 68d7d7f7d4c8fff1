"""Optimizers by timm's names, with a learning rate and a weight decay a group.

SGD, Adam and AdamW are torch's own with `fused=True`. That is the faster one on a CPU, too: a step of a
ResNet-18 on one core (torch 2.15) takes 4.3 ms with it in place of 12.5 ms (foreach) for SGD, 7 in place of
40 ms for AdamW.

Example:
    >>> config = OptimizerSection(name="adamw", peak_lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    >>> optimizer = build_optimizer(model, config, head=[model.head])
    >>> set_learning_rate(optimizer, 5e-4, momentum=0.9)     # each group at 5e-4 × its lr_scale
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from train.config import OptimizerSection
from train.param_groups import build_groups

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_FUSED_DEVICES = ("cuda", "cpu")
# timm turns Nesterov's momentum on for any SGD; here optimizer.nesterov says, or a name that has it.
_NESTEROV_BY_CONFIG = ("momentum", "lars", "larc")
_NESTEROV_BY_NAME = ("nesterov", "nesterovw", "nlars", "nlarc")
_OWN_KEYS = {"lr": "peak_lr", "momentum": "momentum", "weight_decay": "weight_decay", "nesterov": "nesterov"}


def build_optimizer(
    model: nn.Module,
    config: OptimizerSection,
    head: Sequence[nn.Module] = (),
    peak_lr: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over all parameters of the model, frozen ones too, on their device.

    Args:
        head: the modules that classify; see `train.param_groups.build_groups`.
        peak_lr: in place of the recipe's, where a search or the batch size gave another.

    Raises:
        ValueError: no such optimizer or option, or what it needs is not installed.
    """
    if fault := _static_fault(config):
        raise ValueError(fault)
    return _build(model, config, head, config.peak_lr if peak_lr is None else peak_lr)


def _build(
    model: nn.Module, config: OptimizerSection, head: Sequence[nn.Module], peak_lr: float
) -> torch.optim.Optimizer:
    groups = build_groups(model, config, head)
    for group in groups:
        group["lr"] = peak_lr * group["lr_scale"]
    devices = {parameter.device.type for parameter in model.parameters()}
    arguments = _arguments(config, devices)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers, about their own speed
            optimizer = create_optimizer_v2(
                groups, config.name, lr=peak_lr, weight_decay=config.weight_decay, **arguments
            )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"optimizer: {config.name} cannot be made ({reason}): check optimizer.options"
        ) from None
    _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a fused SGD its buffers at once: zeros, from which the first step makes what it would have made.

    torch 2.15 makes them for all parameters of a group in the first step, or fails with a TypeError where
    some have theirs already, as after a phase that trained the head only.
    """
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["fused"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _arguments(config: OptimizerSection, devices: set[str]) -> dict[str, Any]:
    """What the optimizer's class is called with besides groups, rate and decay."""
    info = _info(config.name)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    if info.has_momentum:
        arguments["momentum"] = config.momentum
    elif info.has_betas and "betas" not in arguments and (betas := _default_betas(info)):
        arguments["betas"] = (config.momentum, *betas[1:])
    name = _base_name(config.name)
    if _follows_nesterov(name) or name in _NESTEROV_BY_NAME:
        wanted = config.nesterov or name in _NESTEROV_BY_NAME
        arguments["nesterov"] = wanted and config.momentum > 0  # torch refuses it without momentum
    can_fuse = info.opt_class in _FUSED and devices <= set(_FUSED_DEVICES) and not arguments.get("dampening")
    if can_fuse and not arguments.keys() & {"fused", "foreach"}:
        arguments["fused"] = True
    return arguments


def _default_betas(info: OptimInfo) -> tuple[float, ...] | None:
    """None where the optimizer has them only on demand, such as Adafactor, which saves memory by that."""
    if info.defaults and "betas" in info.defaults:
        return info.defaults["betas"]
    if isinstance(info.opt_class, str):
        return (0.9, 0.999, 0.9999)[: info.num_betas]
    return inspect.signature(info.opt_class).parameters["betas"].default


def _follows_nesterov(name: str) -> bool:
    return "sgd" in name or name in _NESTEROV_BY_CONFIG


def _base_name(name: str) -> str:
    """timm's name in lower case, without `lookahead_`, the wrapper that it knows (Zhang et al., 2019)."""
    return name.lower().removeprefix("lookahead_")


def _info(name: str) -> OptimInfo:
    return get_optimizer_info(_base_name(name))


def optimizer_fault(config: OptimizerSection) -> str | None:
    """A sentence where no optimizer can be made of this section, else None; one is tried on a small layer."""
    if fault := _static_fault(config):
        return fault
    try:
        _build(nn.Linear(4, 4), config.model_copy(update={"backbone_lr_fraction": 1.0}), (), config.peak_lr)
    except ValueError as error:
        return str(error)
    return None


def _static_fault(config: OptimizerSection) -> str | None:
    name, known = _base_name(config.name), [str(known) for known in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list them with timm.optim.list_optimizers()"
        return f"optimizer.name: timm has no optimizer {config.name!r}; {hint}"
    info = _info(name)
    if info.second_order:
        return f"optimizer.name: {name} needs second derivatives, which this training does not compute"
    if isinstance(info.opt_class, str):
        package = info.opt_class.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            place = "https://github.com/NVIDIA/apex" if package == "apex" else f"pip install {package}"
            return f"optimizer.name: {name} needs {package}, which is not installed ({place})"
        if not torch.cuda.is_available():
            return f"optimizer.name: {name} needs a CUDA device"
        return None
    return _options_fault(config, info)


def _options_fault(config: OptimizerSection, info: OptimInfo) -> str | None:
    name = _base_name(config.name)
    own = {k: v for k, v in _OWN_KEYS.items() if k != "nesterov" or _follows_nesterov(name)}
    signature = inspect.signature(info.opt_class)  # type: ignore[arg-type]
    valid = [option for option in signature.parameters if option != "params" and option not in own]
    for option in config.options:
        if option in own:
            return f"optimizer.options.{option}: set optimizer.{own[option]} instead"
        if option not in valid:
            near = difflib.get_close_matches(option, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(valid)}"
            return f"optimizer.options.{option}: {name} has no such option; {hint}"
    betas = config.options.get("betas")
    if betas is not None and not (isinstance(betas, list | tuple) and len(betas) == info.num_betas):
        return f"optimizer.options.betas: {name} takes a list of {info.num_betas} numbers"
    if betas is not None and not info.has_momentum and betas[0] != config.momentum:
        return (
            f"optimizer.options.betas begins with {betas[0]}, and optimizer.momentum is {config.momentum:g}: "
            "both are the first beta, make them equal"
        )
    return None


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, momentum: float | None) -> None:
    """Set the rate of all groups to `learning_rate` times their `lr_scale`, and the momentum unless None.

    The momentum of Adam and its kin is the first of `betas`; an optimizer without momentum is left as it is.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if momentum is None:
            continue
        if "momentum" in group:
            group["momentum"] = momentum
        elif group.get("betas") is not None:
            group["betas"] = (momentum, *group["betas"][1:])


def set_peak_lr(optimizer: torch.optim.Optimizer, peak_lr: float) -> None:
    """Tell optimizers that decay by the share of the peak (AdamC and its kin) one found later."""
    if "max_lr_snapshot" in optimizer.defaults:
        optimizer.defaults["max_lr_snapshot"] = peak_lr
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = peak_lr * group.get("lr_scale", 1.0)


def scaled_peak_lr(config: OptimizerSection, global_batch_size: int) -> float:
    """`peak_lr` for this batch: linear in it (Goyal et al., 2017) where `peak_lr_batch_size` is set."""
    if config.peak_lr_batch_size is None:
        return config.peak_lr
    return config.peak_lr * global_batch_size / config.peak_lr_batch_size
