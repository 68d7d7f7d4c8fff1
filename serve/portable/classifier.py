"""What every classifier here can do, whatever computes its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .limits import Limits
from .model_info import ModelInfo
from .predictions import Prediction, top_predictions


class Classifier(ABC):
    """Bytes of image files → classes with probabilities.

    `prepare` and `logits` are the two halves of `classify`, for those who prepare in many threads and compute
    in batches; both may be called from several threads at once.

    Attributes:
        info: preprocessing, class names, provenance.
        limits: what is accepted as an image.
    """

    def __init__(self, info: ModelInfo, limits: Limits | None = None) -> None:
        self.info = info
        self.limits = limits or Limits()

    def prepare(self, content: bytes) -> NDArray[np.uint8]:
        """Bytes of one image file → the model's input, uint8 (resolution, resolution, 3).

        Raises:
            BadImage: they cannot be used; one sentence.
        """
        return self.info.preprocessing(content, self.limits)

    @abstractmethod
    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Prepared images (n, resolution, resolution, 3) → logits (n, classes)."""

    def predict(self, images: NDArray[np.uint8], top: int = 5) -> list[Prediction]:
        """Prepared images → their `top` most probable classes."""
        if not len(images):
            return []
        return top_predictions(self.logits(images), self.info.names, top)

    def classify(self, contents: Sequence[bytes], top: int = 5) -> list[Prediction]:
        """Bytes of image files → the `top` most probable classes of each, in one batch.

        Raises:
            BadImage: one of them cannot be used.
        """
        if not contents:
            return []
        return self.predict(np.stack([self.prepare(content) for content in contents]), top)
