"""A figure on a page, drawn for desktops and for phones."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from data_prep.page import data_uri
from evaluation.plot_style import PHONE_INCHES, PIXEL_DENSITY, WIDE_INCHES, png_bytes

PICTURE_GRID = Path(__file__).with_name("picture_grid.css")  # for images side by side, right ones and wrong


@dataclass(frozen=True)
class PlotImage:
    """A figure of the page: PNG bytes for a desktop, and for a phone (None: the wide one, to be scrolled)."""

    alt: str
    wide_png: bytes
    phone_png: bytes | None


def draw_plot(alt: str, plot: Callable[[float], Figure], *, has_phone: bool = True) -> PlotImage:
    """`plot` (width in inches → figure) drawn for a desktop and, unless it must scroll there, a phone."""
    return PlotImage(
        alt=alt,
        wide_png=png_bytes(plot(WIDE_INCHES)),
        phone_png=png_bytes(plot(PHONE_INCHES)) if has_phone else None,
    )


def plot_html(plot: PlotImage) -> str:
    # A PNG states its size at the bytes 16 to 24; with it the page does not jump while it loads.
    width, height = (int.from_bytes(plot.wide_png[i : i + 4], "big") // PIXEL_DENSITY for i in (16, 20))
    phone, scroll = "", " scroll"
    if plot.phone_png is not None:
        phone, scroll = f'<source media="(max-width: 640px)" srcset="{data_uri(plot.phone_png, "png")}">', ""
    return (
        f'<div class="card plot{scroll}"><picture>{phone}<img width="{width}" height="{height}" '
        f'alt="{html.escape(plot.alt)}" src="{data_uri(plot.wide_png, "png")}"></picture></div>'
    )
