"""Random images of the split with what the model said about them: drawn by seed, shown as a grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.metrics import Predictions, distinct_names, softmax
from evaluation.plot_style import (
    GREEN,
    INK,
    MUTED,
    RED,
    SMALL_POINTS,
    TEXT_POINTS,
    WIDE_INCHES,
    new_figure,
    plain_text,
)
from evaluation.text import percent_text


@dataclass(frozen=True)
class PredictedImage:
    """One image of the grid: uint8 (height, width, 3), and the softmax of the predicted and the true class.

    source: where the image came from, empty where unknown.
    """

    image: NDArray[np.uint8]
    sample_id: int
    predicted_name: str
    confidence: float
    true_name: str
    is_right: bool
    true_confidence: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        shape, dtype = self.image.shape, self.image.dtype
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
            raise ValueError(
                f"The image of sample {self.sample_id} must be uint8 (height, width, 3), not {dtype} {shape}."
            )


def draw_predicted_images(
    predictions: Predictions,
    read_image: Callable[[int], NDArray[np.uint8]],
    num_images: int,
    seed: int,
    sample_key: Callable[[int], str] | None = None,
) -> list[PredictedImage]:
    """`num_images` samples of the split at random, without repetition (all of them where it has fewer).

    The draw depends on the seed and the sample ids alone, not on the order in which ranks delivered them, so
    that two checkpoints are shown on the same images. read_image turns a sample id into its image, uint8
    (height, width, 3). ValueError for a negative number or a read_image that returns something else.
    """
    if num_images < 0:
        raise ValueError(f"The number of images to show must be at least 0, not {num_images}.")
    by_sample_id = np.argsort(predictions.sample_ids)
    draw = np.random.default_rng(seed).permutation(predictions.num_samples)[:num_images]
    names = distinct_names(predictions.class_names)
    return [
        predicted_image(predictions, row, read_image, names, sample_key)
        for row in by_sample_id[draw].tolist()
    ]


def predicted_image(
    predictions: Predictions,
    row: int,
    read_image: Callable[[int], NDArray[np.uint8]],
    names: Sequence[str],
    sample_key: Callable[[int], str] | None = None,
) -> PredictedImage:
    """The image of one row of the predictions, with `names` (one a label) for its classes."""
    label, predicted = int(predictions.labels[row]), int(predictions.predicted_labels[row])
    sample_id = int(predictions.sample_ids[row])
    probabilities = softmax(predictions.logits[row])
    return PredictedImage(
        image=np.asarray(read_image(sample_id)),
        sample_id=sample_id,
        predicted_name=names[predicted],
        confidence=float(probabilities[predicted]),
        true_name=names[label],
        is_right=predicted == label,
        true_confidence=float(probabilities[label]),
        source=sample_key(sample_id) if sample_key else "",
    )


def plot_prediction_grid(
    items: Sequence[PredictedImage], *, columns: int = 6, width_inches: float = WIDE_INCHES
) -> Figure:
    """Images with the predicted class and its confidence; where it is wrong, the true class below.

    Each image is shown as its centre square. Right has a tick and green, wrong a cross and vermilion.
    ValueError for no image.
    """
    if not items:
        raise ValueError("There is no image to show in the prediction grid.")
    columns = min(columns, len(items))
    num_rows = math.ceil(len(items) / columns)
    gap, caption = 0.14, 0.62
    side = (width_inches - gap * (columns + 1)) / columns
    height_inches = gap + num_rows * (side + caption)
    figure = new_figure(width_inches, height_inches)
    figure.set_layout_engine("none")
    max_chars = int(side * 72 / (TEXT_POINTS * 0.62))
    for index, item in enumerate(items):
        row, column = divmod(index, columns)
        left = gap + column * (side + gap)
        top = height_inches - gap - row * (side + caption)
        axes = figure.add_axes(
            (left / width_inches, (top - side) / height_inches, side / width_inches, side / height_inches)
        )
        axes.imshow(centre_square(item.image))
        axes.set_xticks([])
        axes.set_yticks([])
        colour, symbol = (GREEN, "✓") if item.is_right else (RED, "✗")
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=1.8)
        name = f"{symbol} {plain_text(item.predicted_name, max_chars - 2)}"
        lines = [(name, colour, "bold", TEXT_POINTS)]
        if not item.is_right:
            lines.append(("true: " + plain_text(item.true_name, max_chars - 4), INK, "normal", SMALL_POINTS))
        lines.append((f"{percent_text(item.confidence, 0)} confident", MUTED, "normal", SMALL_POINTS))
        for line, (text, text_colour, weight, points) in enumerate(lines):
            y = -(0.07 + 0.155 * line) / side
            style: dict[str, Any] = {"color": text_colour, "fontweight": weight, "fontsize": points}
            axes.text(0, y, text, transform=axes.transAxes, va="top", **style)
    return figure


def centre_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The largest centred square of an image (height, width, 3): near what a validation crop sees."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
