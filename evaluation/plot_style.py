"""The look that all figures of a report share: colours, sizes, text and how a figure becomes PNG bytes.

Figures are `matplotlib.figure.Figure` objects, drawn by Agg; nothing touches pyplot's global state, so they
work in threads and without a display. Sizes are in inches at 100 CSS pixels an inch; the PNG has twice as
many pixels, so it is sharp on the screens people have.
"""

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDE_INCHES = 10.4  # the text column of the report on a desktop
PHONE_INCHES = 3.6  # and on a phone
CSS_PIXELS_PER_INCH = 100
PIXEL_DENSITY = 2

INK = "#1b2430"
MUTED = "#5b6675"
GRID = "#e3e7ec"
NEVER = "#f5f6f8"  # a confusion that did not happen
EMPTY = "#d9dee5"  # a class without samples
# Blue and orange, and this green and vermilion, stay apart with every common colour blindness.
BLUE = "#1f6fb4"
ORANGE = "#d1570c"
GREEN = "#0b7a5c"
RED = "#b8321a"
BLUES = LinearSegmentedColormap.from_list("right", [NEVER, "#cfe2f3", "#6aa5d8", BLUE, "#0d3b66"])
ORANGES = LinearSegmentedColormap.from_list("wrong", [NEVER, "#fbd9bd", "#f0975a", ORANGE, "#7a2f04"])

TITLE_POINTS = 10.0
TEXT_POINTS = 8.5
SMALL_POINTS = 7.5


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty white figure on an Agg canvas whose parts keep clear of each other."""
    figure = Figure(
        figsize=(width_inches, height_inches),
        dpi=CSS_PIXELS_PER_INCH * PIXEL_DENSITY,
        facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str = "", *, grid: Literal["", "x", "y"] = "") -> None:
    """Quiet ticks, the title at the left; grid is "", "x" or "y" and brings the axis line it starts from."""
    for side, spine in axes.spines.items():
        spine.set_visible((side, grid) in (("left", "x"), ("bottom", "y")))
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=TEXT_POINTS, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=TEXT_POINTS)
    axes.yaxis.label.set(color=MUTED, fontsize=TEXT_POINTS)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=TITLE_POINTS, fontweight="bold", pad=10)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def plain_text(text: str, max_chars: int = 1000) -> str:
    """A name as a figure can show it: on one line, shortened with "…", and no dollar sign read as maths."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(line.split()) or "(no name)"
    if len(line) > max_chars:
        line = line[: max_chars - 1].rstrip(" ,;_-") + "…"
    return line.replace("$", r"\$")


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    # Without the metadata the file would change with matplotlib's version alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
