"""Classifiers: of a checkpoint, a run or an exported folder.

Example:
    >>> classifier = open_classifier(Path("runs/mine"))
    >>> classifier.classify([Path("photo.jpg").read_bytes()])[0].names[0]
    'glacier'
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.manifest import Manifest
from serve.model_folder import Source, is_exported, load_source
from serve.portable.classifier import Classifier
from serve.portable.limits import BadImage, Limits
from serve.portable.model_info import load_info
from serve.portable.onnx_classifier import OnnxClassifier
from serve.portable.predictions import Prediction
from serve.served_model import ServedModel

__all__ = [
    "BadImage",
    "Classifier",
    "Limits",
    "OnnxClassifier",
    "Prediction",
    "TorchClassifier",
    "open_classifier",
]


class TorchClassifier(Classifier):
    """A checkpoint file, a run folder (its best one), or an exported folder with safetensors; in fp32.

    Attributes:
        source: the network itself (`source.model`, float NCHW → logits), its normalisation, its recipe.

    Raises:
        ValueError: there is none of these, or it is damaged.
    """

    def __init__(
        self,
        path: Path | Source,
        limits: Limits | None = None,
        device: torch.device | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.source = path if isinstance(path, Source) else load_source(path, device, manifest)
        super().__init__(self.source.info, limits)
        self._served = ServedModel(self.source.model, self.source.normalize, self.info.flip_average).eval()
        self._turn = threading.Lock()  # hooks of Grad-CAM and the like see one computation at a time

    @torch.inference_mode()
    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.source.device)
        with self._turn:
            return self._served(batch).cpu().numpy()


def open_classifier(
    path: Path, limits: Limits | None = None, num_threads: int | None = None, form: str | None = None
) -> Classifier:
    """A classifier for whatever is at `path`: a checkpoint, a run, or an exported folder.

    Args:
        num_threads: of onnxruntime; None: as many as there are cores.
        form: `onnx`, `int8` or `safetensors` of an exported folder; None: the first of these that it has.

    Raises:
        ValueError: there is none of these, or it is damaged.
    """
    if not is_exported(path):
        if form is not None:
            raise ValueError(f"{path} is no exported folder, so it has no form {form}: leave it out")
        return TorchClassifier(path, limits)
    info = load_info(path)
    chosen = form or next((name for name in ("onnx", "int8", "safetensors") if name in info.files), "onnx")
    if chosen == "safetensors":
        return TorchClassifier(path, limits)
    return OnnxClassifier(path, chosen, limits, num_threads)
