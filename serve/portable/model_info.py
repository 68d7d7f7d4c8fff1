"""`preprocessing.json` of an exported folder: how images become a model's input, and what its classes are.

It may come from anybody: whatever is not as it should be is one sentence.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .preprocessing import Preprocessing

INFO_NAME = "preprocessing.json"
FORMAT_VERSION = 1
MAX_BYTES = 64 << 20
MAX_SIDE = 2048


@dataclass(frozen=True)
class ModelInfo:
    """What belongs to a model's weights.

    Attributes:
        class_names: by label, as in the training data.
        display_names: what people call the classes; empty where these are the same.
        flip_average: whether the model itself averages an image and its mirror image.
        files: form (`onnx`, `int8`, `safetensors`, …) → file name in the folder.
        model: the recipe's section of that name, from which the network can be built again.
        provenance: where the weights come from: run, checkpoint and its SHA-256, data set, version.
    """

    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    display_names: tuple[str, ...] = ()
    flip_average: bool = False
    files: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What to show: the display names, or else the class names."""
        return self.display_names or self.class_names

    @property
    def title(self) -> str:
        """`resnet50 of run mine`."""
        name = str(self.model.get("name") or "model")
        run = self.provenance.get("run")
        return f"{name} of run {run}" if run else name

    def file(self, folder: Path, form: str) -> Path:
        """The file of a form. ValueError: the folder has none."""
        name = self.files.get(form)
        if name is None or not (folder / name).is_file():
            there = ", ".join(sorted(self.files)) or "none"
            raise ValueError(
                f"{folder} holds no {form} model (there is: {there}): export it with that format"
            )
        return folder / name

    def save(self, folder: Path) -> None:
        """Write the file into `folder`, whole or not at all."""
        steps = self.preprocessing
        content = {
            "format_version": FORMAT_VERSION,
            "input": {
                "layout": "NHWC",
                "dtype": "uint8",
                "channels": "RGB",
                "normalization": "(pixel / 255 - mean) / std, inside model.onnx, TorchScript and pt2; the "
                "weights alone (safetensors) want it done before, as float32 NCHW",
            },
            "resolution": steps.resolution,
            "crop_ratio": steps.crop_ratio,
            "crop": "centred square of crop_ratio times the shorter side",
            "interpolation": "area",
            "resolution_cap": steps.resolution_cap,
            "cap_side": steps.cap_side,
            "apply_exif": steps.apply_exif,
            "mean": list(steps.mean),
            "std": list(steps.std),
            "flip_average": self.flip_average,
            "class_names": list(self.class_names),
            "display_names": list(self.display_names),
            "files": self.files,
            "model": self.model,
            "provenance": self.provenance,
        }
        partial = folder / f".{INFO_NAME}.partial"
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder / INFO_NAME)


def load_info(folder: Path) -> ModelInfo:
    """The `preprocessing.json` of an exported folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / INFO_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {INFO_NAME}, so it is no exported model: python -m serve export makes one"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0][:150]
        raise ValueError(f"{path} is damaged ({what}): export the model again") from None


def _parse(content: dict[str, Any]) -> ModelInfo:
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"its format_version is not {FORMAT_VERSION}")
    resolution, cap = content["resolution"], content["resolution_cap"]
    if not _is_whole(resolution, 8, MAX_SIDE):
        raise ValueError(f"resolution must be from 8 to {MAX_SIDE}")
    if cap is not None and not _is_whole(cap, 8, 65535):
        raise ValueError("resolution_cap must be from 8 to 65535, or null")
    crop_ratio = content["crop_ratio"]
    if not _is_number(crop_ratio) or not 0 < crop_ratio <= 1:
        raise ValueError("crop_ratio must be above 0 and at most 1")
    names = _texts(content["class_names"], "class_names")
    display = _texts(content.get("display_names") or [], "display_names")
    if not names or (display and len(display) != len(names)):
        raise ValueError("it has no class_names, or other display_names than classes")
    files = content.get("files") or {}
    for name in files.values():
        # A name of somebody else's must not lead out of the folder.
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise ValueError("files must be plain names")
    return ModelInfo(
        preprocessing=Preprocessing(
            resolution=resolution,
            crop_ratio=float(crop_ratio),
            mean=_three(content["mean"], "mean", -math.inf),
            std=_three(content["std"], "std", 0.0),
            resolution_cap=cap,
            cap_side="shortest" if content["cap_side"] == "shortest" else "longest",
            apply_exif=content["apply_exif"] is True,
        ),
        class_names=names,
        display_names=display,
        flip_average=content["flip_average"] is True,
        files=dict(files),
        model=dict(content.get("model") or {}),
        provenance=dict(content.get("provenance") or {}),
    )


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _three(values: Any, name: str, above: float) -> tuple[float, float, float]:
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(_is_number(v) and v > above for v in values)
    ):
        raise ValueError(f"{name} must be three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be texts")
    if any("\ud800" <= char <= "\udfff" for value in values for char in value):
        raise ValueError(f"{name} hold halves of characters, which nobody could print")
    return tuple(values)
