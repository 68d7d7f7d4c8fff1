"""Write the report of an evaluation: a page to read, its figures as PNG, and its numbers as JSON.

    files = write_report(Path("runs/first/report"), predictions, read_image, title="ResNet-50, 16 epochs",
                         metrics_rows=rows, summary=summary, details={"resolution": "256"})

Files are written under a temporary name and renamed, the page last: a reader never sees half of one.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.metrics import EvaluationResults, Predictions, evaluate
from evaluation.plot_style import PHONE_INCHES, WIDE_INCHES, png_bytes
from evaluation.plots import (
    MAX_NAMED_CLASSES,
    plot_confusion_matrix,
    plot_per_class_accuracy,
    plot_training_curves,
)
from evaluation.prediction_grid import draw_predicted_images, plot_prediction_grid
from evaluation.report_page import PlotImage, ReportContent, render_page

MAX_PHONE_CLASSES = 12  # of a confusion matrix that is legible on a phone without scrolling


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written; None for a figure that there was nothing to draw for."""

    html: Path
    json: Path
    confusion_matrix: Path
    per_class_accuracy: Path
    training_curves: Path | None
    prediction_grid: Path | None


def write_report(
    out_dir: Path,
    predictions: Predictions,
    read_image: Callable[[int], NDArray[np.uint8]],
    *,
    title: str,
    metrics_rows: Sequence[Mapping[str, Any]] | None,
    summary: Mapping[str, Any] | None,
    details: Mapping[str, str],
    seed: int = 0,
    num_grid_images: int = 24,
) -> ReportFiles:
    """Write report.html, report.json and the figures into out_dir, which is made if it is missing.

    read_image: sample id → the stored image, uint8 (height, width, 3); called for the images of the grid
    only. metrics_rows and summary are metrics.jsonl and summary.json of the run, None or incomplete where
    there is none. details are shown as a table; their "resolution", or else the summary's
    validation_resolution, is named beside the accuracies. seed draws the images of the grid. ValueError for
    images of another shape or a negative num_grid_images; what read_image raises passes through, and then
    nothing is written.
    """
    results = evaluate(predictions)
    images = draw_predicted_images(predictions, read_image, num_grid_images, seed)
    confusion = _confusion_plot(predictions, results)
    per_class = _plot_image(
        "Top-1 accuracy of each class as bars with intervals",
        lambda width: plot_per_class_accuracy(results.table, width_inches=width),
    )
    curves = _curves_plot(metrics_rows or [])
    page = render_page(
        ReportContent(
            title=title,
            class_names=predictions.class_names,
            results=results,
            confusion_plot=confusion,
            per_class_plot=per_class,
            curves_plot=curves,
            images=images,
            seed=seed,
            summary=summary or {},
            details=details,
        )
    )
    grid_png = png_bytes(plot_prediction_grid(images)) if images else None

    numbers = _report_json(title, predictions, results, details)

    out_dir.mkdir(parents=True, exist_ok=True)
    curves_png = None if curves is None else curves.wide_png
    return ReportFiles(
        confusion_matrix=_replace_file(out_dir / "confusion_matrix.png", confusion.wide_png),
        per_class_accuracy=_replace_file(out_dir / "per_class_accuracy.png", per_class.wide_png),
        training_curves=_replace_or_remove(out_dir / "training_curves.png", curves_png),
        prediction_grid=_replace_or_remove(out_dir / "prediction_grid.png", grid_png),
        json=_replace_file(out_dir / "report.json", _utf8(numbers)),
        html=_replace_file(out_dir / "report.html", _utf8(page)),
    )


def _confusion_plot(predictions: Predictions, results: EvaluationResults) -> PlotImage:
    def plot(width_inches: float) -> Figure:
        return plot_confusion_matrix(results.confusion, predictions.class_names, width_inches=width_inches)

    alt = "Confusion matrix: rows are true classes, columns predicted ones"
    must_scroll = MAX_PHONE_CLASSES < predictions.num_classes <= MAX_NAMED_CLASSES
    return _plot_image(alt, plot, has_phone=not must_scroll)


def _curves_plot(rows: Sequence[Mapping[str, Any]]) -> PlotImage | None:
    try:
        return _plot_image(
            "Loss, accuracy and learning rate during training",
            lambda width: plot_training_curves(rows, width_inches=width),
        )
    except ValueError:  # no row has anything to draw: a run stopped before its first log line
        return None


def _plot_image(alt: str, plot: Callable[[float], Figure], *, has_phone: bool = True) -> PlotImage:
    return PlotImage(
        alt=alt,
        wide_png=png_bytes(plot(WIDE_INCHES)),
        phone_png=png_bytes(plot(PHONE_INCHES)) if has_phone else None,
    )


def _report_json(
    title: str, predictions: Predictions, results: EvaluationResults, details: Mapping[str, str]
) -> str:
    """Fractions and counts; a class without samples has null where others have a fraction."""
    names = predictions.class_names
    fields: dict[str, Any] = {
        "title": title,
        "num_samples": results.num_samples,
        "num_classes": predictions.num_classes,
        "top1": results.top1,
        "top1_interval": results.top1_interval,
        "top5": results.top5,
        "top5_interval": results.top5_interval,
        "details": dict(details),
        "most_confused_pairs": [
            {"true": names[pair.true_label], "predicted": names[pair.predicted_label], **asdict(pair)}
            for pair in results.most_confused
        ],
        "per_class": [asdict(row) for row in results.table],
        "confusion_matrix": results.confusion.tolist(),
    }
    # A line a field, and a line an entry of the long ones: a person can read it, and a diff shows a class.
    lines = []
    for key, value in fields.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if isinstance(value, list) and value:
            entries = ",\n  ".join(json.dumps(entry, allow_nan=False, ensure_ascii=False) for entry in value)
            text = f"[\n  {entries}\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _utf8(text: str) -> bytes:
    # A folder's name may hold bytes that are no text; they are written as "\\udcff", valid in JSON too.
    return text.encode("utf-8", errors="backslashreplace")


def _replace_or_remove(path: Path, data: bytes | None) -> Path | None:
    if data is None:
        path.unlink(missing_ok=True)  # a figure of an earlier report would pass for one of this
        return None
    return _replace_file(path, data)


def _replace_file(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
