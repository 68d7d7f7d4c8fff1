"""A run's figures over its epochs, from the rows of its metrics.jsonl.

Example:
    >>> curve([{"split": "val", "epoch": 1, "top1": 0.5}], "val", "top1")
    Curve(epochs=array([1.]), values=array([0.5]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import finite_number

# Rows may come from anybody; a figure that is larger is none, and no axis could show it.
MOST_EPOCHS, MOST_VALUE = 1e6, 1e15
FRACTIONS = ("top1", "top5")


@dataclass(frozen=True, eq=False)
class Curve:
    """Values over epochs, in the order of the epochs; both float64 of shape (n,), n may be 0."""

    epochs: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.epochs)


def curve(rows: Sequence[Mapping[str, Any]], split: str, field: str) -> Curve:
    """One field of one split; what is missing, no finite number or out of all reason is passed over.

    Where a resumed run wrote a moment twice, the later row counts.
    """
    points: dict[float, float] = {}
    most = 1.0 if field in FRACTIONS else MOST_VALUE
    for row in rows:
        if row.get("split") == split:
            epoch, value = finite_number(row.get("epoch")), finite_number(row.get(field))
            if epoch is None or value is None:
                continue
            if 0 <= epoch <= MOST_EPOCHS and -MOST_VALUE <= value <= most:
                points[epoch] = value
    ordered = sorted(points.items())
    table = np.array(ordered, dtype=np.float64).reshape(-1, 2)
    return Curve(table[:, 0], table[:, 1])


def smoothed(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The running mean over `width` neighbours, fewer at the ends; the same shape."""
    if width <= 1 or not len(values):
        return values
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
