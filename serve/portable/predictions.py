"""Logits → the most probable classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first one the answer.

    Attributes:
        labels: ordinals of the classes. names: what they are called. probabilities: softmax, 0 to 1.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `{"top": [{"label": 3, "name": "glacier", "probability": 0.93}, …]}`."""
        rows = zip(self.labels, self.names, self.probabilities, strict=True)
        return {
            "top": [
                {"label": label, "name": name, "probability": round(probability, 6)}
                for label, name, probability in rows
            ]
        }


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities of rows of logits, shape (n, classes)."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(1, keepdims=True)


def top_predictions(logits: NDArray[np.floating], names: Sequence[str], top: int = 5) -> list[Prediction]:
    """The `top` most probable classes of each row; of equal logits the lower label comes first.

    Raises:
        RuntimeError: logits are no numbers.
    """
    if not np.isfinite(logits).all():
        raise RuntimeError("the model gives no numbers (NaN or infinite), so it has no answer")
    probabilities = softmax(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, : min(top, logits.shape[1])]
    return [
        Prediction(
            labels=tuple(labels.tolist()),
            names=tuple(names[label] for label in labels),
            probabilities=tuple(row[labels].tolist()),
        )
        for row, labels in zip(probabilities, order, strict=True)
    ]
