"""Names beside points, where they hide least.

Example:
    >>> place_labels(axes, points, ["andesite", "basalt"], obstacles=points, points_size=6)
    0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.plot_style import CSS_PIXELS_PER_INCH, INK, PIXEL_DENSITY

# Directions around a point, nearest to reading habits first: right, left, above, below, and the corners.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (4.0, 8.0, 13.0)  # pixels of the page


def place_labels(
    axes: Axes,
    points: NDArray[np.float64],
    names: Sequence[str],
    obstacles: NDArray[np.float64],
    points_size: float,
) -> int:
    """Write each name near its point so that it covers no other name and as few points as can be.

    The most crowded points choose first. A name for which there is no room is left out.

    Args:
        points, obstacles: data coordinates, (n, 2) and (m, 2); the axes' limits must be final.
        points_size: of the text, in points.

    Returns:
        How many names were left out.
    """
    figure, canvas = axes.figure, axes.figure.canvas
    assert isinstance(figure, Figure) and isinstance(canvas, FigureCanvasAgg)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    pixels = CSS_PIXELS_PER_INCH * PIXEL_DENSITY / 100
    places = axes.transData.transform(points)
    hidden = axes.transData.transform(obstacles)
    frame = axes.get_window_extent(renderer)
    halo = [patheffects.withStroke(linewidth=1.6, foreground="white", alpha=0.85)]
    style: dict[str, Any] = {"color": INK, "va": "center", "ha": "center", "path_effects": halo, "zorder": 5}
    texts = [axes.text(0, 0, name, fontsize=points_size, **style) for name in names]
    sizes = []
    for text in texts:
        extent = text.get_window_extent(renderer)
        sizes.append(
            (extent.width, extent.height * 0.86)
        )  # the box has room for accents that names rarely have
    distances = np.linalg.norm(places[:, None] - hidden[None], axis=2)
    crowding = np.sort(distances, axis=1)[:, : min(6, len(hidden))].mean(1)
    taken: list[tuple[float, float, float, float]] = []
    num_left_out = 0
    for index in np.argsort(crowding).tolist():
        best, best_cost = None, np.inf
        for far, distance in enumerate(_DISTANCES):
            for rank, (right, up) in enumerate(_DIRECTIONS):
                box = _box(places[index], sizes[index], right, up, distance * pixels)
                if not (
                    frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
                ):
                    continue
                if any(_overlap(box, other) for other in taken):
                    continue
                inside = (hidden >= (box[0], box[1])) & (hidden <= (box[2], box[3]))
                cost = 4.0 * inside.all(1).sum() + 1.5 * far + 0.1 * rank
                if cost < best_cost:
                    best, best_cost = box, cost
        if best is None:
            texts[index].remove()
            num_left_out += 1
            continue
        taken.append(best)
        centre = ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)
        texts[index].set_position(tuple(axes.transData.inverted().transform(centre)))
    return num_left_out


def _box(
    place: NDArray[np.float64], size: tuple[float, float], right: int, up: int, distance: float
) -> tuple[float, float, float, float]:
    width, height = size
    x = place[0] + right * (distance + width / 2)
    y = place[1] + up * (distance + height / 2)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
