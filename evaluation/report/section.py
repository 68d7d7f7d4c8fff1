"""A section of the report, what it is made from, and the HTML that sections have in common.

A section is a module in `evaluation/report/sections/` with a function `build`, and a line in the list there:

    def build(content: ReportContent) -> Section | None:
        return Section("Calibration", "What it says in a sentence.", plot_html(plot),
                       files={"calibration.png": plot.wide_png}, figures={"calibration": {"ece": 0.03}},
                       metrics={"ece": 0.03})

What needs more than the predictions (the model, an option) builds its Section in the command and hands it to
`write_report(more_sections=…)`.

Class names, details and titles come from data sets and command lines, so they are untrusted: every text goes
through `html.escape` on its way into the page, and the page's own policy forbids it any request.
"""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.page import data_uri
from evaluation.image_properties import ImageProperties
from evaluation.metrics import EvaluationResults, Predictions
from evaluation.report.prediction_grid import centre_square

THUMBNAIL_PIXELS = 320  # shown at about 160


@dataclass(frozen=True)
class Section:
    """One section of the page and all that it leaves elsewhere.

    Attributes:
        heading, note: text, escaped by the page.
        body_html: HTML, escaped by whoever made it.
        files: file name → PNG bytes, written beside the page.
        figures: keys of report.json, fractions; a key must not be another section's.
        metrics: for MLflow, where `report_` stands before the names.
    """

    heading: str
    note: str
    body_html: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportContent:
    """What sections are made from.

    Attributes:
        read_image: sample id → the stored image, uint8 (height, width, 3).
        metrics_rows, summary: metrics.jsonl and summary.json of the run; empty where there is none.
        details: shown as a table.
        seed: of all that is drawn at random.
        sample_key: sample id → where the image came from; None where unknown.
        properties: what the images are like, where that was measured.
        num_grid_images: random predictions to show; 0: no images anywhere on the page.
    """

    title: str
    predictions: Predictions
    results: EvaluationResults
    read_image: Callable[[int], NDArray[np.uint8]]
    metrics_rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    details: Mapping[str, str]
    sample_key: Callable[[int], str] | None = None
    properties: ImageProperties | None = None
    seed: int = 0
    num_grid_images: int = 24

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.predictions.class_names


def cell_html(text: str, sort_value: object, classes: str = "", style: str = "") -> str:
    """A cell of a sortable table; `style` is HTML."""
    value = html.escape(str(sort_value))
    return f'<td class="{classes}"{style} data-value="{value}">{html.escape(text)}</td>'


def thumbnail_uri(image: NDArray[np.uint8], pixels: int = THUMBNAIL_PIXELS) -> str:
    """The centre square of an image (height, width, 3) as a JPEG data URI, at most so many pixels wide."""
    picture = Image.fromarray(np.ascontiguousarray(centre_square(image)))
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")
