"""`config.json` and `model.safetensors` as timm wants them, where timm can build the network.

Example:
    >>> timm.create_model("local-dir:exported/mine", pretrained=True)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.model_folder import TIMM_CONFIG_NAME
from serve.portable.model_info import ModelInfo
from train.config import ModelSection


def timm_fault(section: ModelSection) -> str | None:
    """Why timm alone cannot build this network, in one sentence; None where it can."""
    reason = None
    if section.library == "own":
        reason = f"{section.name} is this project's own network"
    elif section.library == "torchvision":
        reason = f"{section.name} is torchvision's network"
    elif section.head is not None:
        reason = "its head was replaced (model.head)"
    elif section.activation is not None:
        reason = f"its activations were changed to {section.activation}"
    elif section.blurpool:
        reason = "it has BlurPool"
    return reason and f"timm cannot build it, since {reason}: load the folder with `serve` or use ONNX."


def write_timm_config(folder: Path, section: ModelSection, info: ModelInfo) -> None:
    """Write `config.json`; see `timm_fault` for whether it makes sense."""
    steps = info.preprocessing
    architecture, _, tag = section.name.partition(".")
    side = [3, steps.resolution, steps.resolution]
    model_args: dict[str, Any] = dict(section.options)
    content: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": len(info.class_names),
        "label_names": list(info.class_names),
        "pretrained_cfg": {
            "tag": tag or str(info.provenance.get("run") or "trained"),
            "custom_load": False,
            "input_size": side,
            "fixed_input_size": False,
            "interpolation": "bilinear",  # timm has no area interpolation; this one is the nearest
            "crop_pct": steps.crop_ratio,
            "crop_mode": "center",
            "mean": list(steps.mean),
            "std": list(steps.std),
            "num_classes": len(info.class_names),
        },
    }
    if info.display_names:
        content["label_descriptions"] = dict(zip(info.class_names, info.display_names, strict=True))
    if model_args:
        content["model_args"] = model_args
    (folder / TIMM_CONFIG_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
