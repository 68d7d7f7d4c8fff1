"""The contact sheet of suspects: each image with the label it has and the one the model suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from evaluation.audit.review import Suspect
from evaluation.plot_style import (
    INK,
    MUTED,
    RED,
    SMALL_POINTS,
    TEXT_POINTS,
    WIDE_INCHES,
    new_figure,
    plain_text,
)
from evaluation.report.prediction_grid import centre_square
from evaluation.text import percent_text


@dataclass(frozen=True)
class SuspectImage:
    """A suspect with its picture, RGB, and the names of its labels."""

    suspect: Suspect
    picture: Image.Image
    given_name: str
    suggested_name: str


def plot_suspects(items: Sequence[SuspectImage], columns: int = 8) -> Figure:
    """Images in the order of the ranking, centre squares. ValueError for no image."""
    if not items:
        raise ValueError("There is no suspect to show.")
    columns = min(columns, len(items))
    num_rows = math.ceil(len(items) / columns)
    gap, caption = 0.12, 0.64
    side = (WIDE_INCHES - gap * (columns + 1)) / columns
    side = min(side, 1.6)
    width_inches = max(columns * (side + gap) + gap, 3.0)
    height_inches = gap + num_rows * (side + caption)
    figure = new_figure(width_inches, height_inches)
    figure.set_layout_engine("none")
    max_chars = int(side * 72 / (TEXT_POINTS * 0.58))
    for place, item in enumerate(items):
        row, column = divmod(place, columns)
        left = gap + column * (side + gap)
        top = height_inches - gap - row * (side + caption)
        axes = figure.add_axes(
            (left / width_inches, (top - side) / height_inches, side / width_inches, side / height_inches)
        )
        axes.imshow(centre_square(np.asarray(item.picture)))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=RED, linewidth=1.4)
        lines = [
            (plain_text(item.given_name, max_chars), INK, "normal", TEXT_POINTS),
            (f"→ {plain_text(item.suggested_name, max_chars - 2)}", RED, "bold", TEXT_POINTS),
            (f"#{item.suspect.rank}  {percent_text(item.suspect.score)}", MUTED, "normal", SMALL_POINTS),
        ]
        for line, (text, colour, weight, points) in enumerate(lines):
            y = -(0.07 + 0.17 * line) / side
            style = {"color": colour, "fontweight": weight, "fontsize": points}
            axes.text(0, y, text, transform=axes.transAxes, va="top", **style)  # type: ignore[arg-type]
    return figure
