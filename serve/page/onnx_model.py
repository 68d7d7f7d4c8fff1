"""An exported folder's ONNX model as the page shows it; with what it looked at, where the model tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.page.facts import facts_of
from serve.page.models import ShownModel
from serve.portable.limits import Limits
from serve.portable.onnx_classifier import OnnxClassifier

MAPS = "maps"


class MappedClassifier(OnnxClassifier):
    """An ONNX model that may put out class activation maps: `maps`, float32 (n, classes, rows, columns).

    B. Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """

    @property
    def has_maps(self) -> bool:
        outputs = self._session.get_outputs()
        return len(outputs) == 2 and outputs[1].name == MAPS and len(outputs[1].shape) == 4

    def heat(self, prepared: NDArray[np.uint8], label: int) -> NDArray[np.float32]:
        """What in a prepared image, uint8 (side, side, 3), speaks for a class: float32 (rows, columns)."""
        (maps,) = self._session.run([MAPS], {self._input_name: np.ascontiguousarray(prepared[None])})
        heat = np.maximum(maps[0, label], 0)
        highest = heat.max()
        return heat / highest if highest > 0 else heat


def open_onnx(folder: Path, limits: Limits) -> ShownModel:
    """The ONNX model of an exported folder or a Space.

    Raises:
        ValueError: there is none, it is damaged, or there is no onnxruntime.
    """
    classifier = MappedClassifier(folder, limits=limits)
    facts = facts_of(classifier.info, ("Computed by", "ONNX Runtime"))
    return ShownModel(classifier, classifier.heat if classifier.has_maps else None, facts)
