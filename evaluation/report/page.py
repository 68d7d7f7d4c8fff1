"""The HTML of an evaluation report: one page that needs nothing but itself."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.page import page, section, tile
from evaluation.metrics import finite_number
from evaluation.plot_image import PICTURE_GRID
from evaluation.report.section import ReportContent, Section
from evaluation.text import count_text, duration_text, interval_text, percent_text

HELD_OUT = "judged itself by"  # the key among the details
STYLES = (PICTURE_GRID, Path(__file__).with_name("page.css"))


def render_page(content: ReportContent, sections: Sequence[Section]) -> str:
    """The whole page as HTML text."""
    return page(
        content.title,
        "Evaluation",
        _headline(content),
        [section(part.heading, part.note, part.body_html) for part in sections],
        "Intervals are 95% Wilson score intervals. Of equal logits the lower label counts as larger. "
        "<code>report.json</code> beside this page holds every figure as a fraction.",
        "".join(path.read_text(encoding="utf-8") for path in STYLES),
        is_sortable=True,
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
    tiles = [tile(f"Top-1 accuracy{at_resolution}", top1, _interval_note(results.top1_interval, digits))]
    if num_classes > 5:  # among five classes every answer is one of the first five
        top5 = percent_text(results.top5, digits)
        lede += f", and the true class is among the first five for {top5}"
        tiles.append(
            tile(f"Top-5 accuracy{at_resolution}", top5, _interval_note(results.top5_interval, digits))
        )
    tiles.append(tile("Images evaluated", f"{results.num_samples:,}", classes))
    note = _training_note(content.summary, content.details.get(HELD_OUT, ""))
    return (
        f'<p class="lede">{html.escape(lede)}.</p>\n<dl class="tiles headline">{"".join(tiles)}</dl>\n'
        f"{_training_tiles(content.summary)}{note}"
    )


def _training_tiles(summary: Mapping[str, Any]) -> str:
    value = {key: finite_number(field) for key, field in summary.items()}.get
    tiles = []
    if (speed := value("images_per_second")) is not None:
        waiting = value("data_wait_fraction")
        note = "" if waiting is None else f"{percent_text(waiting)} waiting for data"
        tiles.append(tile("Training speed", f"{speed:,.0f} images/s", note))
    if (seconds := value("wall_seconds")) is not None:
        notes = [f"{epochs:g} epochs"] if (epochs := value("epochs")) is not None else []
        notes += [f"world size {size:g}"] if (size := value("world_size")) is not None else []
        tiles.append(tile("Training time", duration_text(seconds), ", ".join(notes)))
    if (cost := value("cost_usd")) is not None:
        tiles.append(tile("Training cost", f"${cost:,.2f}", "at the price stated below"))
    if (parameters := value("num_parameters")) is not None:
        tiles.append(tile("Parameters", f"{parameters / 1e6:,.1f} million"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n' if tiles else ""


def _training_note(summary: Mapping[str, Any], held_out: str) -> str:
    """`held_out`: the fold that the training judged itself by, which is other images than this page's."""
    value = {key: finite_number(field) for key, field in summary.items()}.get
    note = ""
    if (final := value("final_top1")) is not None:
        resolution = value("validation_resolution")
        at = "" if resolution is None else f" at {resolution:g} pixels"
        on = f" on {held_out}, not on these images," if held_out else ""
        note = (
            f"The training run itself measured {percent_text(final, 2)} top-1{at}{on} after its last epoch. "
        )
    if (best := value("best_top1")) is not None:
        epoch = value("best_epoch")
        number = "" if epoch is None else f" ({epoch:g})"
        note += (
            f"Its best epoch{number} reached {percent_text(best, 2)}, chosen on the images it is judged by."
        )
    return f'<p class="note">{html.escape(note)}</p>\n' if note else ""


def _interval_note(interval: tuple[float, float], digits: int) -> str:
    return f"95% interval {interval_text(interval, digits)}"


def _resolution(content: ReportContent) -> str:
    stated = str(content.details.get("resolution", "")).strip()
    if not stated and (side := finite_number(content.summary.get("validation_resolution"))):
        stated = f"{side:g}"
    return f"{stated} pixels" if stated.isdigit() else stated
