"""The logits of an exported file, to compare it: TorchScript and pt2 only of a folder that was just written.

Both of these hold code: nobody should load those of a stranger, and no other command here does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serve.classifier import OnnxClassifier, TorchClassifier
from serve.export.agreement import Logits


def load_form(folder: Path, form: str, path: Path) -> Logits:
    """What computes the logits of prepared images with this file."""
    if form in ("onnx", "int8"):
        return OnnxClassifier(folder, form).logits
    if form == "safetensors":
        return TorchClassifier(folder).logits
    if form == "torchscript":
        module = torch.jit.load(str(path))
    else:
        module = torch.export.load(path).module()

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    return logits
