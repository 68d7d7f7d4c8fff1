"""Where the model looks: Grad-CAM over confident mistakes and over right answers."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import Predictions, distinct_names, softmax
from evaluation.report.section import Section, thumbnail_uri
from evaluation.text import percent_text

HEADING = "What the model looks at"


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The image under its map for a class, uint8 (height, width, 3); empty where nothing speaks for it."""

    label: int
    overlay: NDArray[np.uint8]
    is_empty: bool


@dataclass(frozen=True, eq=False)
class ExplainedImage:
    """An image, uint8 (height, width, 3), and maps: of the class predicted, and the true one if another."""

    sample_id: int
    image: NDArray[np.uint8]
    label: int
    confidence: float
    maps: tuple[ClassMap, ...]

    @property
    def predicted_label(self) -> int:
        return self.maps[0].label


def choose_images(predictions: Predictions, num_images: int, seed: int) -> NDArray[np.int64]:
    """Positions of the images to explain: half of them the most confident mistakes, then right ones by seed.

    Where there are too few of one sort the other fills up; of equal confidence the lower sample id is first.
    """
    confidence = softmax(predictions.logits).max(axis=1)
    is_right = predictions.predicted_labels == predictions.labels
    by_confidence = np.lexsort((predictions.sample_ids, -confidence))
    wrong = by_confidence[~is_right[by_confidence]]
    # By sample id, so that the draw does not depend on the order of the predictions.
    right = np.argsort(predictions.sample_ids)[np.random.default_rng(seed).permutation(len(is_right))]
    right = right[is_right[right]]
    num_wrong = min(len(wrong), max(num_images - num_images // 2, num_images - len(right)))
    return np.concatenate([wrong[:num_wrong], right[: num_images - num_wrong]]).astype(np.int64)


def build_grad_cam(
    images: Sequence[ExplainedImage],
    class_names: Sequence[str],
    layer: str,
    grid: tuple[int, int],
    seed: int,
) -> Section | None:
    """The section of these images, None without any; grid: rows and columns of the layer's map."""
    if not images:
        return None
    names = distinct_names(class_names)
    wrong = [item for item in images if item.predicted_label != item.label]
    right = [item for item in images if item.predicted_label == item.label]
    parts = [
        _group("The most confident mistakes", "mistakes", wrong, names),
        _group(f"Right answers, drawn at random (seed {seed})", "right-ones", right, names),
    ]
    note = (
        f"Grad-CAM at the layer {layer}, whose map has {grid[0]} × {grid[1]} places: "
        "the brighter a region, the more it speaks for the class that is "
        "named below the picture; dark regions do not. Each map is scaled to its own maximum. It shows which "
        "places counted, not why."
    )
    return Section(HEADING, note, "\n".join(part for part in parts if part))


def _group(heading: str, kind: str, images: Sequence[ExplainedImage], names: Sequence[str]) -> str:
    if not images:
        return ""
    cards = "\n".join(_card(item, names) for item in images)
    return f'<h3 class="cam-heading">{html.escape(heading)}</h3>\n<div class="cams {kind}">\n{cards}\n</div>'


def _card(item: ExplainedImage, names: Sequence[str]) -> str:
    predicted, true = html.escape(names[item.predicted_label]), html.escape(names[item.label])
    is_right = item.predicted_label == item.label
    pictures = [(item.image, f"An image of {true}", f"true: {true}")]
    for class_map in item.maps:
        name = html.escape(names[class_map.label])
        caption = f"nothing for {name}" if class_map.is_empty else f"for {name}"
        pictures.append((class_map.overlay, f"What speaks for {name}", caption))
    cells = "".join(
        f'<div><img alt="{alt}" src="{thumbnail_uri(picture)}"><span>{caption}</span></div>'
        for picture, alt, caption in pictures
    )
    verdict, symbol = ("right", "✓") if is_right else ("wrong", "✗")
    return (
        f'<figure class="card cam {verdict}" title="sample {item.sample_id}">'
        f'<div class="pictures">{cells}</div><figcaption><b>{symbol} {predicted}</b> '
        f"{percent_text(item.confidence, 0)} confident</figcaption></figure>"
    )
