"""Pieces of HTML that the page of a comparison is put together from; text in, escaped HTML out."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.plot_style import PIXEL_DENSITY


@dataclass(frozen=True)
class Picture:
    """A figure as PNG, for a desktop and for a phone."""

    alt: str
    wide_png: bytes
    phone_png: bytes


def section(heading: str, note: str, body: str) -> str:
    """heading and note are text, body is HTML."""
    paragraph = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{paragraph}{body}\n</section>"


def plot_card(picture: Picture) -> str:
    # A PNG states its size at the bytes 16 to 24; with it the page does not jump while it loads.
    width, height = (int.from_bytes(picture.wide_png[i : i + 4], "big") // PIXEL_DENSITY for i in (16, 20))
    phone = f'<source media="(max-width: 640px)" srcset="{_data_uri(picture.phone_png)}">'
    size = f'width="{width}" height="{height}"'
    image = f'<img {size} alt="{html.escape(picture.alt)}" src="{_data_uri(picture.wide_png)}">'
    return f'<div class="card plot"><picture>{phone}{image}</picture></div>'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def tile(label: str, figure: str, note: str = "") -> str:
    small = f'<dd class="note">{html.escape(note)}</dd>' if note else ""
    shown = f'<dd class="figure">{html.escape(figure)}</dd>'
    return f'<div class="tile"><dt>{html.escape(label)}</dt>{shown}{small}</div>'


def p_text(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0015 else f"p = {p:.1g}"


def signed(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def range_cell(values: Sequence[float]) -> str:
    mean = mean_of(values)
    text = "–" if mean is None else signed(mean)
    span = f"<span>{signed(min(values))} to {signed(max(values))}</span>" if len(values) > 1 else ""
    return f'<td class="number">{text}{span}</td>'
