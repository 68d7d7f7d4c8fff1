"""The HTML of an evaluation report: one page that needs nothing but itself.

Class names, details and the title come from data sets and command lines, so they are untrusted: every text
goes through `html.escape` on its way into the page, and the page's own policy forbids it any request.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.metrics import ClassMetrics, EvaluationResults, distinct_names, finite_number
from evaluation.plot_style import PIXEL_DENSITY
from evaluation.plots import labels_per_block
from evaluation.prediction_grid import PredictedImage, centre_square
from evaluation.text import count_text, duration_text, interval_text, percent_text

TEMPLATE = Path(__file__).with_name("report_template.html")
THUMBNAIL_PIXELS = 320  # shown at about 160


@dataclass(frozen=True)
class PlotImage:
    """A figure of the page: PNG bytes for a desktop, and for a phone (None: the wide one, to be scrolled)."""

    alt: str
    wide_png: bytes
    phone_png: bytes | None


@dataclass(frozen=True)
class ReportContent:
    """What a page shows. Without curves or images their sections are left out."""

    title: str
    class_names: Sequence[str]
    results: EvaluationResults
    confusion_plot: PlotImage
    per_class_plot: PlotImage
    curves_plot: PlotImage | None
    images: Sequence[PredictedImage]
    seed: int
    summary: Mapping[str, Any]
    details: Mapping[str, str]


def render_page(content: ReportContent) -> str:
    """The whole page as HTML text."""
    sections = [
        _curves_section(content),
        _confusion_section(content),
        _per_class_section(content),
        _images_section(content),
        _details_section(content),
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(content.title),
        headline=_headline(content),
        sections="\n".join(section for section in sections if section),
        footer="Intervals are 95% Wilson score intervals. Of equal logits the lower label counts as larger. "
        "<code>report.json</code> beside this page holds every figure as a fraction.",
    )


def _headline(content: ReportContent) -> str:
    results, num_classes = content.results, len(content.class_names)
    digits = 2 if results.num_samples >= 10_000 else 1
    resolution = _resolution(content)
    at_resolution = f" at {resolution}" if resolution else ""
    num_seen = sum(row.count > 0 for row in results.table)
    classes = ("" if num_seen == num_classes else f"{num_seen:,} of ") + count_text(
        num_classes, "class", "classes"
    )
    top1 = percent_text(results.top1, digits)
    lede = f"{count_text(results.num_samples, 'image')} of {classes}{at_resolution}: "
    lede += f"the first answer is right for {top1}"
    tiles = [_tile(f"Top-1 accuracy{at_resolution}", top1, _interval_note(results.top1_interval, digits))]
    if num_classes > 5:  # among five classes every answer is one of the first five
        top5 = percent_text(results.top5, digits)
        lede += f", and the true class is among the first five for {top5}"
        tiles.append(
            _tile(f"Top-5 accuracy{at_resolution}", top5, _interval_note(results.top5_interval, digits))
        )
    tiles.append(_tile("Images evaluated", f"{results.num_samples:,}", classes))
    return (
        f'<p class="lede">{html.escape(lede)}.</p>\n<dl class="tiles headline">{"".join(tiles)}</dl>\n'
        f"{_training_tiles(content.summary)}{_training_note(content.summary)}"
    )


def _training_tiles(summary: Mapping[str, Any]) -> str:
    value = {key: finite_number(field) for key, field in summary.items()}.get
    tiles = []
    if (speed := value("images_per_second")) is not None:
        waiting = value("data_wait_fraction")
        note = "" if waiting is None else f"{percent_text(waiting)} waiting for data"
        tiles.append(_tile("Training speed", f"{speed:,.0f} images/s", note))
    if (seconds := value("wall_seconds")) is not None:
        notes = [f"{epochs:g} epochs"] if (epochs := value("epochs")) is not None else []
        notes += [f"world size {size:g}"] if (size := value("world_size")) is not None else []
        tiles.append(_tile("Training time", duration_text(seconds), ", ".join(notes)))
    if (cost := value("cost_usd")) is not None:
        tiles.append(_tile("Training cost", f"${cost:,.2f}"))
    if (parameters := value("num_parameters")) is not None:
        tiles.append(_tile("Parameters", f"{parameters / 1e6:,.1f} million"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n' if tiles else ""


def _training_note(summary: Mapping[str, Any]) -> str:
    value = {key: finite_number(field) for key, field in summary.items()}.get
    note = ""
    if (final := value("final_top1")) is not None:
        resolution = value("validation_resolution")
        at = "" if resolution is None else f" at {resolution:g} pixels"
        note = f"The training run itself measured {percent_text(final, 2)} top-1{at} after its last epoch. "
    if (best := value("best_top1")) is not None:
        epoch = value("best_epoch")
        number = "" if epoch is None else f" ({epoch:g})"
        note += f"Its best epoch{number} reached {percent_text(best, 2)} but was chosen on the same images."
    return f'<p class="note">{html.escape(note)}</p>\n' if note else ""


def _curves_section(content: ReportContent) -> str:
    if content.curves_plot is None:
        return ""
    note = "As logged by the run. A pale line is what single rows say, the strong one their running mean."
    return _section("Training", note, _plot(content.curves_plot))


def _confusion_section(content: ReportContent) -> str:
    names = distinct_names(content.class_names)
    pairs = "\n".join(
        f"<li>{html.escape(names[pair.true_label])} → {html.escape(names[pair.predicted_label])}"
        f"<span>{count_text(pair.count, 'image')}, {percent_text(pair.fraction)} of the class</span>"
        f'<i class="bar" style="--share:{pair.fraction:.4f}"></i></li>'
        for pair in content.results.most_confused
    )
    listing = f"<ol>\n{pairs}\n</ol>" if pairs else "<p>Not one image was misclassified.</p>"
    note = (
        "Each row is a true class, each column what it was taken for, in percent of the row. Blue is right; "
        "orange is wrong, on a scale that lifts small shares."
    )
    if (block := labels_per_block(len(names))) > 1:
        note = (
            f"{block} neighbouring labels share a row and a column. Blue stays in its block, right or not; "
            "orange leaves it, on a scale that lifts small shares."
        )
    return _section(
        "Confusion matrix",
        note,
        f'<div class="side-by-side">\n{_plot(content.confusion_plot)}\n<div class="card pairs">'
        f"<h3>Most confused, true → predicted</h3>\n{listing}</div>\n</div>",
    )


def _per_class_section(content: ReportContent) -> str:
    names = distinct_names(content.class_names)
    has_top5 = len(names) > 5
    heads = [("Class", ""), ("Images", "wide"), ("Top-1", ""), ("95% interval", "wide")]
    heads += [("Top-5", "wide")] if has_top5 else []
    heads += [("Most often mistaken for", "")]
    head = "".join(
        f'<th scope="col" class="{width}" aria-sort="{"ascending" if text == "Top-1" else "none"}">'
        f'<button type="button">{text}</button></th>'
        for text, width in heads
    )
    # The classes that need work come first, those without a figure last.
    ordered = sorted(content.results.table, key=lambda row: (row.top1 is None, row.top1, row.label))
    body = "\n".join(_class_row(row, names, has_top5) for row in ordered)
    measured = [(names[row.label], percent_text(row.top1)) for row in ordered if row.top1 is not None]
    note = "The hardest class is {} with {} top-1".format(*measured[0])
    if len(measured) > 1:
        note += ", the easiest {} with {}".format(*measured[-1])
    return _section(
        "Accuracy of each class",
        note + ".",
        f'{_plot(content.per_class_plot)}\n<div class="card table" tabindex="0" role="region" '
        f'aria-label="Accuracy of each class"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>",
    )


def _class_row(row: ClassMetrics, names: Sequence[str], has_top5: bool) -> str:
    cells = [_cell(names[row.label], names[row.label]), _cell(f"{row.count:,}", row.count, "number wide")]
    if row.top1 is None or row.top1_interval is None or row.top5 is None:
        cells += [_cell("–", ""), *[_cell("–", "", "wide")] * (1 + has_top5), _cell("–", "")]
        return f"<tr>{''.join(cells)}</tr>"
    share = f' style="--share:{row.top1:.4f}"'
    cells.append(_cell(percent_text(row.top1), f"{row.top1:.6f}", "number accuracy", share))
    cells.append(_cell(interval_text(row.top1_interval), f"{row.top1_interval[0]:.6f}", "number wide"))
    if has_top5:
        cells.append(_cell(percent_text(row.top5), f"{row.top5:.6f}", "number wide"))
    if row.most_common_error is None:
        cells.append(_cell("never", ""))
    else:
        error = names[row.most_common_error]
        cells.append(_cell(f"{error} ({row.most_common_error_count:,})", error))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, sort_value: object, classes: str = "", style: str = "") -> str:
    value = html.escape(str(sort_value))
    return f'<td class="{classes}"{style} data-value="{value}">{html.escape(text)}</td>'


def _images_section(content: ReportContent) -> str:
    if not content.images:
        return ""
    num_right = sum(item.is_right for item in content.images)
    num_images = count_text(len(content.images), "image")
    note = f"{num_images} drawn at random (seed {content.seed}), {num_right} of them right."
    cards = "\n".join(map(_image_card, content.images))
    return _section("Predictions", note, f'<div class="grid">\n{cards}\n</div>')


def _image_card(item: PredictedImage) -> str:
    predicted, true = html.escape(item.predicted_name), html.escape(item.true_name)
    verdict, symbol = ("right", "✓") if item.is_right else ("wrong", "✗")
    truth = "" if item.is_right else f'<span class="truth">true: {true}</span>'
    return (
        f'<figure class="{verdict}"><img alt="An image of {true}" title="sample {item.sample_id}" '
        f'src="{thumbnail_uri(item.image)}"><figcaption><b>{symbol} {predicted}</b>{truth}'
        f"<span>{percent_text(item.confidence, 0)} confident</span></figcaption></figure>"
    )


def _details_section(content: ReportContent) -> str:
    if not content.details:
        return ""
    rows = "\n".join(
        f"<div><dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for key, value in content.details.items()
    )
    return _section("Details", "", f'<dl class="card details">\n{rows}\n</dl>')


def _section(heading: str, note: str, body: str) -> str:
    """heading and note are text, body is HTML."""
    paragraph = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{paragraph}{body}\n</section>"


def _plot(plot: PlotImage) -> str:
    # A PNG states its size at the bytes 16 to 24; with it the page does not jump while it loads.
    width, height = (int.from_bytes(plot.wide_png[i : i + 4], "big") // PIXEL_DENSITY for i in (16, 20))
    phone, scroll = "", " scroll"
    if plot.phone_png is not None:
        phone, scroll = f'<source media="(max-width: 640px)" srcset="{_data_uri(plot.phone_png, "png")}">', ""
    return (
        f'<div class="card plot{scroll}"><picture>{phone}<img width="{width}" height="{height}" '
        f'alt="{html.escape(plot.alt)}" src="{_data_uri(plot.wide_png, "png")}"></picture></div>'
    )


def _tile(label: str, figure: str, note: str = "") -> str:
    small = f'<dd class="note">{html.escape(note)}</dd>' if note else ""
    label, figure = html.escape(label), html.escape(figure)
    return f'<div class="tile"><dt>{label}</dt><dd class="figure">{figure}</dd>{small}</div>'


def _interval_note(interval: tuple[float, float], digits: int) -> str:
    return f"95% interval {interval_text(interval, digits)}"


def _resolution(content: ReportContent) -> str:
    stated = str(content.details.get("resolution", "")).strip()
    if not stated and (side := finite_number(content.summary.get("validation_resolution"))):
        stated = f"{side:g}"
    return f"{stated} pixels" if stated.isdigit() else stated


def thumbnail_uri(image: NDArray[np.uint8]) -> str:
    """The centre square of an image (height, width, 3) as a JPEG data URI, at most 320 pixels wide."""
    picture = Image.fromarray(np.ascontiguousarray(centre_square(image)))
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
