"""Reliability diagram and confidence histogram, before and after temperature scaling."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from evaluation.calibration import Calibration
from evaluation.metrics import wilson_interval
from evaluation.plot_style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    SMALL_POINTS,
    WIDE_INCHES,
    new_figure,
    style_axes,
)

FEW_IMAGES = 10  # a bin with fewer is drawn pale


def plot_calibration(measured: Mapping[str, Calibration], *, width_inches: float = WIDE_INCHES) -> Figure:
    """For each title: top-1 against confidence with 95% Wilson intervals, and the share of images in a bin.

    On the diagonal a model is as often right as it says; below it is overconfident. ValueError for nothing.
    """
    if not measured:
        raise ValueError("There is no calibration to plot.")
    is_stacked = width_inches < 6
    num_panels = len(measured)
    columns, stacks = (1, num_panels) if is_stacked else (num_panels, 1)
    panel_inches = min(width_inches / columns, 5.2)
    figure = new_figure(panel_inches * columns, 4.6 * stacks if is_stacked else 4.9)
    # One row of two a panel: the diagram above, the histogram below it.
    grid = figure.add_gridspec(2 * stacks, columns, height_ratios=[3, 1] * stacks)
    for place, (title, calibration) in enumerate(measured.items()):
        row, column = (2 * place, 0) if is_stacked else (0, place)
        diagram = figure.add_subplot(grid[row, column])
        _draw_diagram(diagram, title, calibration)
        _draw_histogram(figure.add_subplot(grid[row + 1, column], sharex=diagram), calibration)
    return figure


def _draw_diagram(axes: Axes, title: str, calibration: Calibration) -> None:
    bins = [b for b in calibration.bins if b.count]
    confidences = np.array([b.confidence for b in bins], dtype=float)
    top1 = np.array([b.top1 for b in bins], dtype=float)
    intervals = np.array([wilson_interval(b.num_right, b.count) for b in bins])
    style_axes(axes, f"{title}: ECE {100 * calibration.ece:.1f} points", grid="y")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.1, dashes=(5, 3))
    # A bin of three images is no curve: it is pale, and no line leads the eye to it.
    strength = np.where(np.array([b.count for b in bins]) >= FEW_IMAGES, 1.0, 0.3)
    colours = [to_rgba(BLUE, alpha) for alpha in strength]
    axes.vlines(confidences, np.minimum(confidences, top1), np.maximum(confidences, top1), linewidth=7,
                colors=[to_rgba(ORANGE, 0.35 * alpha) for alpha in strength])  # fmt: skip
    axes.vlines(confidences, intervals[:, 0], intervals[:, 1], colors=colours, linewidth=1.3)
    axes.scatter(confidences, top1, s=34, c=colours, zorder=3, linewidths=0)
    style: dict[str, Any] = {"color": MUTED, "fontsize": SMALL_POINTS, "style": "italic"}
    axes.text(0.03, 0.95, "less sure than right", va="top", **style)
    axes.text(0.98, 0.03, "surer than right", ha="right", **style)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("right (top-1)")


def _draw_histogram(axes: Axes, calibration: Calibration) -> None:
    total = sum(b.count for b in calibration.bins)
    lows = np.array([b.low for b in calibration.bins])
    widths = np.array([b.high - b.low for b in calibration.bins])
    right = np.array([b.num_right for b in calibration.bins]) / total
    wrong = np.array([b.count for b in calibration.bins]) / total - right
    common: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    axes.bar(lows, right, widths, color=BLUE, alpha=0.85, label="right", **common)
    axes.bar(lows, wrong, widths, bottom=right, color=ORANGE, alpha=0.85, label="wrong", **common)
    style_axes(axes, grid="y")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("confidence of the answer")
    axes.set_ylabel("of images")
    axes.legend(frameon=False, fontsize=SMALL_POINTS, labelcolor=INK, loc="upper left", handlelength=1)
