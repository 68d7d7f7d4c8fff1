"""Write the report of an evaluation: a page to read, its figures as PNG, and its numbers as JSON.

    files = write_report(Path("runs/first/report"), predictions, read_image, title="ResNet-50, 16 epochs",
                         metrics_rows=rows, summary=summary, details={"resolution": "256"})

Files are written under a temporary name and renamed, the page last: a reader never sees half of one.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.plain_json import read_json
from evaluation.files import utf8_bytes, write_file
from evaluation.image_properties import ImageProperties
from evaluation.metrics import Predictions, evaluate
from evaluation.predictions_file import PREDICTIONS_NAME, TEXTS, predictions_bytes
from evaluation.report.page import render_page
from evaluation.report.section import ReportContent, Section
from evaluation.report.sections import BUILDERS, LAST_BUILDERS

MAX_JSON_BYTES = 1 << 30  # the confusion matrix of 21,000 classes is 900 MB of it


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written, and its figures for MLflow (name → value).

    `plots` holds the PNG files by name; a section without anything to draw left none.
    """

    html: Path
    json: Path
    predictions: Path
    plots: Mapping[str, Path]
    metrics: Mapping[str, float]


def write_report(
    out_dir: Path,
    predictions: Predictions,
    read_image: Callable[[int], NDArray[np.uint8]],
    *,
    title: str,
    metrics_rows: Sequence[Mapping[str, Any]] | None,
    summary: Mapping[str, Any] | None,
    details: Mapping[str, str],
    sample_key: Callable[[int], str] | None = None,
    properties: ImageProperties | None = None,
    seed: int = 0,
    num_grid_images: int = 24,
    more_sections: Sequence[Section] = (),
) -> ReportFiles:
    """Write the page, its JSON, its figures and the predictions into out_dir, which is made if it is missing.

    Args:
        read_image: sample id → the stored image, uint8 (height, width, 3); called for images shown only.
        metrics_rows, summary: metrics.jsonl and summary.json of the run, None or incomplete where there is
            none.
        details: shown as a table; their "resolution", or else the summary's validation_resolution, is named
            beside the accuracies.
        sample_key: sample id → where the image came from.
        properties: what the images are like, for the accuracy against it.
        seed: draws the random images; num_grid_images of them, 0 for no images anywhere on the page.
        more_sections: come before the details.

    Raises:
        ValueError: images of another shape, or a negative num_grid_images. What read_image raises passes
            through; nothing is written then.
    """
    content = ReportContent(
        title=title,
        predictions=predictions,
        results=evaluate(predictions),
        read_image=read_image,
        metrics_rows=metrics_rows or [],
        summary=summary or {},
        details=details,
        sample_key=sample_key,
        properties=properties,
        seed=seed,
        num_grid_images=num_grid_images,
    )
    built = [*(build(content) for build in BUILDERS), *more_sections]
    built += [build(content) for build in LAST_BUILDERS]
    sections = [section for section in built if section is not None]
    page = render_page(content, sections)
    pngs = {name: data for section in sections for name, data in section.files.items()}
    numbers = _report_json(content, sections, sorted(pngs))
    metrics = {f"top{k}": getattr(content.results, f"top{k}") for k in (1, 5)}
    metrics |= {name: value for section in sections for name, value in section.metrics.items()}

    out_dir.mkdir(parents=True, exist_ok=True)
    for name in _files_of_earlier_report(out_dir) - set(pngs):
        (out_dir / name).unlink(missing_ok=True)  # it would pass for a figure of this one
    return ReportFiles(
        plots={name: write_file(out_dir / name, data) for name, data in pngs.items()},
        predictions=write_file(out_dir / PREDICTIONS_NAME, predictions_bytes(predictions)),
        json=write_file(out_dir / "report.json", utf8_bytes(numbers)),
        html=write_file(out_dir / "report.html", utf8_bytes(page)),
        metrics={f"report_{name}": value for name, value in metrics.items()},
    )


def _report_json(content: ReportContent, sections: Sequence[Section], files: list[str]) -> str:
    """Fractions and counts; a class without samples has null where others have a fraction."""
    results = content.results
    fields: dict[str, Any] = {
        "title": content.title,
        "num_samples": results.num_samples,
        "num_classes": content.predictions.num_classes,
        "top1": results.top1,
        "top1_interval": results.top1_interval,
        "top5": results.top5,
        "top5_interval": results.top5_interval,
    }
    # Whose figures these are: whoever quotes them must be able to tell. Empty where it is not known.
    fields |= {name: getattr(content.predictions, name, "") for name in TEXTS}
    for section in sections:
        assert not section.figures.keys() & fields.keys(), f"{section.heading}: a key of another section"
        fields |= section.figures
    fields["files"] = files
    # A line a field, and a line an entry of the long ones: a person can read it, and a diff shows a class.
    lines = []
    for key, value in fields.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if isinstance(value, list) and value:
            entries = ",\n  ".join(json.dumps(entry, allow_nan=False, ensure_ascii=False) for entry in value)
            text = f"[\n  {entries}\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _files_of_earlier_report(out_dir: Path) -> set[str]:
    """The PNG files that the report in this folder names, if there is one."""
    try:
        numbers = read_json(out_dir / "report.json", MAX_JSON_BYTES)
    except (OSError, ValueError):
        return set()
    names = numbers.get("files") if isinstance(numbers, dict) else None
    # It may be anybody's file: only a plain name of a figure in this folder may go.
    return {
        name
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str) and re.fullmatch(r"\w[\w-]{0,99}\.png", name)
    }
