"""The look of a data card: colours, sizes, fonts, and how figures and pictures become bytes.

The same colours and sizes as in the evaluation report, so that the two lie well side by side. Figures are
drawn by Agg without pyplot's global state; sizes are in inches at 100 CSS pixels an inch, with twice as many
pixels in the PNG. matplotlib and Pillow are needed here and in the modules that draw.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image, ImageFont

WIDE_INCHES = 10.8  # the text column of the page on a desktop
PHONE_INCHES = 3.5  # and on a phone
CSS_PIXELS_PER_INCH = 100
PIXEL_DENSITY = 2

PAGE = "#f4f6f8"
CARD = "#ffffff"
LINE = "#dfe4ea"
INK = "#1b2430"
MUTED = "#5b6675"
GRID = "#e3e7ec"
BLUE = "#1f6fb4"  # train
ORANGE = "#d1570c"  # val; the two stay apart with every common colour blindness
SPLIT_COLOURS = {"train": BLUE, "val": ORANGE}
BLUES = LinearSegmentedColormap.from_list("density", ["#dbe9f6", "#6aa5d8", BLUE, "#0d3b66"])

TITLE_POINTS = 10.0
TEXT_POINTS = 8.5
SMALL_POINTS = 7.5


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty white figure on an Agg canvas whose parts keep clear of each other."""
    figure = Figure(
        figsize=(width_inches, height_inches),
        dpi=CSS_PIXELS_PER_INCH * PIXEL_DENSITY,
        facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.06, hspace=0.06),
    )
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str = "", *, grid: Literal["", "x", "y"] = "") -> None:
    """Quiet ticks, the title at the left; grid is "", "x" or "y" and brings the axis line it starts from."""
    for side, spine in axes.spines.items():
        spine.set_visible((side, grid) in (("left", "x"), ("bottom", "y")))
        spine.set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=TEXT_POINTS, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=TEXT_POINTS)
    axes.yaxis.label.set(color=MUTED, fontsize=TEXT_POINTS)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=TITLE_POINTS, fontweight="bold", pad=10)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def one_line(text: str, max_chars: int = 1000) -> str:
    """A name as a picture can show it: on one line, shortened with "…"."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(line.split()) or "(no name)"
    if len(line) > max_chars:
        line = line[: max_chars - 1].rstrip(" ,;_-") + "…"
    return line


def figure_text(text: str, max_chars: int = 1000) -> str:
    """The same for matplotlib, which would read dollar signs as maths."""
    return one_line(text, max_chars).replace("$", r"\$")


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def picture_of(figure: Figure) -> Image.Image:
    """The figure as an RGB picture."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def font(css_pixels: float, density: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface of the figures, for Pillow."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), css_pixels * density
    )


def count_text(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def bytes_text(count: float) -> str:
    """A size with three figures at least, in decimal units: "84.0 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"
