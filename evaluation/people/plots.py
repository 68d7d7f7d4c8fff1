"""The figures of a comparison with people: both spaces overlaid, dimensions, similarities, layers by depth.

Each function returns a `matplotlib.figure.Figure` and takes the width it may use in inches, so that the same
figure exists for a desktop and a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from evaluation.people.labelling import place_labels
from evaluation.people.procrustes import SpaceFit
from evaluation.plot_style import (
    BLUE,
    BLUES,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    SMALL_POINTS,
    TEXT_POINTS,
    WIDE_INCHES,
    new_figure,
    plain_text,
    style_axes,
)

Array = NDArray[np.float64]
MAX_NAMED_ROWS = 60
DASHED = {"linestyle": (0, (4, 2.5)), "linewidth": 1.4}


def plot_spaces(
    fit: SpaceFit,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    rows_of_names: Sequence[Sequence[int]],
    *,
    width_inches: float = WIDE_INCHES,
) -> Figure:
    """Human and model points after the fit, two dimensions at a time, joined by thin lines.

    Args:
        pairs: dimensions, counted from 0.
        names: one a marked point. rows_of_names: the rows whose mean it is; where these are several, the rows
            themselves are drawn faintly.
    """
    is_narrow = width_inches < 6
    num_columns = 1 if is_narrow or len(pairs) == 1 else 2
    num_rows = -(-len(pairs) // num_columns)
    side = min(width_inches / num_columns, 7.2)
    figure = new_figure(side * num_columns, side * 0.94 * num_rows + 0.3)
    human = np.stack([fit.human[list(rows)].mean(0) for rows in rows_of_names])
    model = np.stack([fit.model[list(rows)].mean(0) for rows in rows_of_names])
    has_samples = max(map(len, rows_of_names)) > 1
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_axis_off()
    for axes, pair in zip(grid.flat, pairs, strict=False):
        chosen = list(pair)
        if has_samples:
            for points, colour in ((fit.human, BLUE), (fit.model, ORANGE)):
                axes.scatter(*points[:, chosen].T, s=5, color=colour, alpha=0.16, linewidths=0, zorder=1)
        for one, other in zip(human[:, chosen], model[:, chosen], strict=True):
            axes.plot(*np.stack([one, other]).T, color=MUTED, linewidth=0.7, alpha=0.7, zorder=2)
        axes.scatter(
            *model[:, chosen].T,
            s=15,
            marker="D",
            facecolor="white",
            edgecolor=ORANGE,
            linewidths=1.2,
            zorder=3,
        )
        axes.scatter(*human[:, chosen].T, s=24, color=BLUE, edgecolor="white", linewidths=0.6, zorder=4)
        style_axes(axes)
        axes.grid(color="#eef1f4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_aspect("equal", adjustable="box")
        _square_limits(axes, np.concatenate([human[:, chosen], model[:, chosen]]))
        for set_label, dimension in ((axes.set_xlabel, pair[0]), (axes.set_ylabel, pair[1])):
            set_label(f"dimension {dimension + 1}  (r = {fit.correlations[dimension]:.2f})")
    hollow: dict[str, Any] = {"marker": "D", "markerfacecolor": "white", "markeredgecolor": ORANGE}
    handles = [
        Line2D([], [], linestyle="", marker="o", color=BLUE, markersize=5, label="people"),
        Line2D([], [], linestyle="", **hollow, markersize=4.5, label="network, after the fit"),
    ]
    legend: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "frameon": False, "labelcolor": INK}
    figure.legend(handles=handles, fontsize=TEXT_POINTS, **legend)
    if len(names) <= MAX_NAMED_ROWS:
        longest = 12 if is_narrow else 20
        shown = [plain_text(name, longest) for name in names]
        for axes, pair in zip(grid.flat, pairs, strict=False):
            chosen = list(pair)
            obstacles = np.concatenate([human[:, chosen], model[:, chosen]])
            place_labels(axes, human[:, chosen], shown, obstacles, 5.6 if is_narrow else 6.8)
    return figure


def _square_limits(axes: Axes, points: Array) -> None:
    """The same span on both axes, around the marked points: samples far out would leave them no room."""
    centre = (points.min(0) + points.max(0)) / 2
    half = max(0.62 * float(np.ptp(points, axis=0).max()), 1e-9)
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] - half, centre[1] + half)


def plot_dimensions(fit: SpaceFit, *, width_inches: float = WIDE_INCHES) -> Figure:
    """Each human dimension: r in the fit with its interval, r outside it, and R² of ridge regression."""
    count = fit.num_dimensions
    figure = new_figure(min(width_inches, 8.0), 1.1 + 0.42 * count)
    axes = figure.add_subplot()
    places = np.arange(count, dtype=float)
    intervals = np.array(fit.correlation_intervals)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.hlines(places - 0.16, intervals[:, 0], intervals[:, 1], color=BLUE, linewidth=1.4, alpha=0.5)
    axes.plot(fit.correlations, places - 0.16, "o", color=BLUE, markersize=6, label="r inside the fit")
    hollow: dict[str, Any] = {"color": "white", "markeredgecolor": BLUE, "markersize": 5.5}
    axes.plot(fit.held_out_correlations, places, "D", **hollow, label="r outside the fit")
    lowest = min(float(intervals.min()), min(fit.held_out_correlations), 0.0)
    if fit.ridge is not None:
        rows = "rows" if fit.ridge.new_classes is None else "images"
        for found, colour, words in (
            (fit.ridge.new_rows, GREEN, f"R² of ridge regression, new {rows}"),
            (fit.ridge.new_classes, ORANGE, "R² of ridge regression, new classes"),
        ):
            if found is not None:
                # A fit far worse than the mean would squeeze all others to one side: it stands at the edge.
                shown = np.maximum(found.r2, -0.5)
                axes.plot(shown, places + 0.16, "s", color=colour, markersize=5, label=words)
                lowest = min(lowest, float(shown.min()))
    axes.set_yticks(places, [f"dimension {number + 1}" for number in range(count)])
    axes.set_ylim(count - 0.5, -0.6)
    axes.set_xlim(min(lowest - 0.06, -0.06), 1.02)
    style_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)  # zero has a line of its own
    axes.tick_params(axis="y", labelcolor=INK)
    columns = 1 if width_inches < 6 else 4
    figure.legend(
        loc="outside upper left", ncols=columns, frameon=False, fontsize=SMALL_POINTS, labelcolor=INK
    )
    return figure


def plot_similarities(
    human: Array, model: Array, names: Sequence[str], *, width_inches: float = WIDE_INCHES
) -> Figure:
    """Both similarity matrices (rows, rows) side by side, as ranks among all pairs; dark is alike."""
    is_narrow = width_inches < 6
    shown = [plain_text(name, 20) for name in names] if len(names) <= MAX_NAMED_ROWS else []
    height = 2 * width_inches if is_narrow else width_inches * 0.5
    figure = new_figure(width_inches, height)
    grid = figure.subplots(2 if is_narrow else 1, 1 if is_narrow else 2, squeeze=False)
    points = float(np.clip(170 / max(len(names), 1), 3.6, SMALL_POINTS))
    for axes, values, title in zip(grid.flat, (human, model), ("People", "Network"), strict=True):
        axes.imshow(_rank_shares(values), cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
        style_axes(axes, title)
        axes.set_xticks([])
        is_named = bool(shown) and (is_narrow or title == "People")
        axes.set_yticks(
            range(len(shown)) if is_named else [], shown if is_named else [], fontsize=points, color=INK
        )
        axes.tick_params(pad=2)
    return figure


def _rank_shares(values: Array) -> Array:
    """Ranks of the pairs from 0 (least alike) to 1; the diagonal, which is not compared, is blank."""
    from scipy.stats import rankdata

    first, second = np.triu_indices(len(values), 1)
    shares = np.full(values.shape, np.nan)
    ranks = rankdata(values[first, second])
    shares[first, second] = shares[second, first] = (ranks - 1) / max(len(ranks) - 1, 1)
    return shares


def plot_layers(
    layers: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    levels: Mapping[str, Mapping[str, float]],
    *,
    width_inches: float = WIDE_INCHES,
) -> Figure:
    """Measures by depth: layers from the first, at the top, to the last.

    Args:
        panels: title → {"trained": values, "random weights": values}, one a layer.
        levels: title → what needs no layer, such as mean colour, drawn as a line.
    """
    is_narrow = width_inches < 6
    height = 0.9 + 0.21 * len(layers)
    grid_shape = (len(panels), 1) if is_narrow else (1, len(panels))
    figure = new_figure(width_inches, height * (len(panels) if is_narrow else 1) + 0.5)
    grid = figure.subplots(*grid_shape, squeeze=False)
    places = np.arange(len(layers))
    styles: dict[str, dict[str, Any]] = {
        "trained": {"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.7},
        "random weights": {
            "color": MUTED,
            "marker": "o",
            "markersize": 3.5,
            "markerfacecolor": "white",
            **DASHED,
        },
    }
    for number, (axes, (title, curves)) in enumerate(zip(grid.flat, panels.items(), strict=True)):
        for name, values in curves.items():
            axes.plot(values, places, label=name if number == 0 else None, **styles[name])
        for (name, level), colour in zip(levels.get(title, {}).items(), (ORANGE, GREEN), strict=False):
            axes.axvline(level, color=colour, linewidth=1.2, label=name if number == 0 else None)
        _name_layers(axes, layers if is_narrow or number == 0 else [], len(layers))
        axes.margins(x=0.08)
        style_axes(axes, title, grid="x")
        axes.tick_params(axis="y", labelcolor=INK, labelsize=SMALL_POINTS)
    legend: dict[str, Any] = {"loc": "outside upper left", "frameon": False, "labelcolor": INK}
    figure.legend(ncols=2 if is_narrow else 4, fontsize=SMALL_POINTS, **legend)
    return figure


def _name_layers(axes: Axes, layers: Sequence[str], count: int) -> None:
    axes.set_yticks(range(count), [plain_text(name, 22) for name in layers] or [""] * count)
    axes.set_ylim(count - 0.5, -0.5)
