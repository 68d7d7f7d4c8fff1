"""The figures of an evaluation report: confusions, accuracy a class, training curves.

Each function returns a `matplotlib.figure.Figure`; `plot_style.png_bytes` turns it into a PNG. All take the
width they may use in inches (100 CSS pixels each), so that the same figure exists for a desktop and a phone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from evaluation.metrics import ClassMetrics, distinct_names, finite_number
from evaluation.plot_style import (
    BLUE,
    BLUES,
    EMPTY,
    INK,
    MUTED,
    ORANGE,
    ORANGES,
    SMALL_POINTS,
    TEXT_POINTS,
    WIDE_INCHES,
    new_figure,
    plain_text,
    style_axes,
)
from evaluation.text import percent_text

MAX_NAMED_CLASSES = 60  # beyond, a confusion matrix has no room for names and figures
MAX_BLOCKS = 100
MAX_CLUSTERED_BLOCKS = (
    50  # a block of classes taken for each other may be larger than one of neighbouring labels
)
MAX_BARS = 60
LOWEST_BARS, HIGHEST_BARS = 30, 10  # shown of a data set with more classes than MAX_BARS
SMOOTHED_FROM_POINTS = 120  # training rows; fewer are drawn as they are


def plot_confusion_matrix(
    matrix: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    width_inches: float = WIDE_INCHES,
    order: NDArray[np.int64] | None = None,
) -> Figure:
    """How often each class (row) was predicted as each (column), in percent of the row.

    matrix: counts, int64 (classes, classes). Right predictions are blue, wrong ones orange, on a scale that
    lifts small shares. Above 60 classes the figure has numbers and no text in its cells, above 100 a cell is
    a block of neighbours and blue means "within the block". order: the labels as they shall follow each other
    (`cluster_order`: then blocks are of classes taken for each other); by default as they are. The row of a
    class without samples is grey.
    """
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"{num_classes} class names do not fit a confusion matrix of shape {matrix.shape}.")
    names = distinct_names(class_names)
    if order is not None:
        matrix, names = matrix[np.ix_(order, order)], [names[label] for label in order]
    if num_classes > MAX_NAMED_CLASSES:
        return _plot_coarse_matrix(matrix, min(width_inches, 6.2), order is not None)
    counts, shares, colours = _shares_and_colours(matrix)
    longest = 26 if width_inches >= 6 else 13
    names = [plain_text(name, longest) for name in names]
    names_inches = 0.35 + 0.075 * max(map(len, names))
    cell_inches = min(0.72, (width_inches - names_inches) / num_classes)
    name_points = float(np.clip(cell_inches * 72 * 0.52, 5.5, TEXT_POINTS))
    is_level = max(map(len, names)) * name_points * 0.62 < cell_inches * 72  # the names fit side by side
    side = cell_inches * num_classes
    figure = new_figure(names_inches + side, side + (0.65 if is_level else names_inches))
    axes = figure.add_subplot()
    axes.imshow(colours, interpolation="nearest")
    _write_shares(axes, shares, counts, cell_inches)
    axes.set_xticks(np.arange(num_classes) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if num_classes <= 20 else 0.6)
    style_axes(axes)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(num_classes), names, fontsize=name_points, color=INK)
    axes.set_yticks(range(num_classes), names, fontsize=name_points, color=INK)
    if not is_level:
        rotation, vertical = (40, "top") if num_classes <= 12 else (90, "center")
        for name in axes.get_xticklabels():
            name.set(rotation=rotation, rotation_mode="anchor", ha="right", va=vertical)
    axes.set_xlabel("predicted class", labelpad=8)
    axes.set_ylabel("true class", labelpad=8)
    return figure


def _shares_and_colours(
    matrix: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Samples a class, int64 (classes,); shares of them, (classes, classes); RGBA, (classes, classes, 4)."""
    counts = matrix.sum(axis=1)
    shares = matrix / np.maximum(counts, 1)[:, None]
    # The square root lifts small shares: on a linear scale the errors of a good model would be white.
    colours = ORANGES(np.sqrt(shares))
    diagonal = np.eye(len(shares), dtype=bool)
    colours[diagonal] = BLUES(shares[diagonal])
    colours[counts == 0] = to_rgba(EMPTY)
    return counts, shares, colours


def _write_shares(
    axes: Axes, shares: NDArray[np.float64], counts: NDArray[np.int64], cell_inches: float
) -> None:
    has_room = cell_inches >= 0.42
    points = float(np.clip(cell_inches * 72 * (0.34 if has_room else 0.42), 4.6, 9.5))
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": points}
    for row, column in np.argwhere(shares > 0).tolist():
        share = shares[row, column]
        if share < 0.005 and not has_room:
            continue  # its tint must do: "<1" would fill the cell
        text = "<1" if share < 0.005 else f"{100 * share:.0f}"
        is_dark = share > (0.65 if row == column else 0.5)
        axes.text(column, row, text + "%" * has_room, color="white" if is_dark else INK, **style)
    for label in np.flatnonzero(counts == 0).tolist():
        axes.text(label, label, "–", color=MUTED, **style)


def classes_per_block(num_classes: int, is_clustered: bool) -> int:
    """How many neighbours share a row of the confusion matrix: more than 1 above 100 classes."""
    is_coarse = is_clustered and num_classes > MAX_BLOCKS
    return math.ceil(num_classes / (MAX_CLUSTERED_BLOCKS if is_coarse else MAX_BLOCKS))


def _plot_coarse_matrix(matrix: NDArray[np.int64], side_inches: float, is_clustered: bool) -> Figure:
    num_classes = len(matrix)
    block = classes_per_block(num_classes, is_clustered)
    position = "place" if is_clustered else "label"
    starts = np.arange(0, num_classes, block)
    blocks = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    _, _, colours = _shares_and_colours(blocks)
    figure = new_figure(side_inches, side_inches)
    axes = figure.add_subplot()
    end = len(blocks) * block - 0.5
    axes.imshow(colours, interpolation="nearest", extent=(-0.5, end, end, -0.5))
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    grouping = f", in blocks of {block}" if block > 1 else ""
    axes.set_xlabel(f"predicted class ({position}{grouping})", labelpad=8)
    axes.set_ylabel(f"true class ({position}{grouping})", labelpad=8)
    return figure


def plot_per_class_accuracy(table: Sequence[ClassMetrics], *, width_inches: float = WIDE_INCHES) -> Figure:
    """Top-1 of each class as a bar with its 95% Wilson interval, highest first.

    Of more than 60 classes the 10 highest and the 30 lowest are shown. Classes without samples are left out;
    ValueError where no class has any.
    """
    names = distinct_names([row.name for row in table])
    bars = [
        (row.top1, row.top1_interval, name)
        for row, name in zip(table, names, strict=True)
        if row.top1 is not None and row.top1_interval is not None
    ]
    if not bars:
        raise ValueError("No class has a sample: there is no accuracy to plot.")
    bars.sort(key=lambda bar: -bar[0])
    num_left_out = 0
    if len(bars) > MAX_BARS:
        num_left_out = len(bars) - HIGHEST_BARS - LOWEST_BARS
        bars = bars[:HIGHEST_BARS] + bars[-LOWEST_BARS:]
    positions = np.arange(len(bars), dtype=float)
    if num_left_out:
        positions[HIGHEST_BARS:] += 1

    figure = new_figure(width_inches, 0.75 + 0.235 * (positions[-1] + 1))
    axes = figure.add_subplot()
    top1 = np.array([bar[0] for bar in bars])
    intervals = np.array([bar[1] for bar in bars])
    axes.barh(positions, top1, height=0.66, color=BLUE, alpha=0.85)
    axes.hlines(positions, intervals[:, 0], intervals[:, 1], color=INK, linewidth=1.1)
    axes.plot(intervals[:, 0], positions, "|", intervals[:, 1], positions, "|", color=INK, markersize=4.5)
    for position, bar in zip(positions, bars, strict=True):
        axes.text(1.02, position, percent_text(bar[0]), va="center", fontsize=TEXT_POINTS, color=INK)
    if num_left_out:
        axes.text(0.01, HIGHEST_BARS, f"… {num_left_out:,} classes between …", va="center",
                  fontsize=SMALL_POINTS, color=MUTED, style="italic")  # fmt: skip
    longest = 40 if width_inches >= 6 else 16
    axes.set_yticks(positions, [plain_text(bar[2], longest) for bar in bars])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1.1 if width_inches >= 6 else 1.22)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    style_axes(axes, grid="x")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("top-1 accuracy, with its 95% interval", loc="left")
    return figure


@dataclass(frozen=True)
class _Curve:
    label: str
    points: list[tuple[float, float]]
    colour: str
    dashes: str = "-"


def plot_training_curves(rows: Sequence[Mapping[str, Any]], *, width_inches: float = WIDE_INCHES) -> Figure:
    """Loss, accuracy and learning rate over the epochs of a run, from the rows of its metrics.jsonl.

    rows: dictionaries with any of split ("train" or "val"), epoch, step, loss, top1, top5, learning_rate;
    what is missing or not a finite number is skipped, and a panel without data is left out. Where a resumed
    run wrote a moment twice, the later row counts. Many training rows are drawn as their running mean over a
    pale original. ValueError where nothing is left to draw.
    """
    position = "epoch" if any(finite_number(row.get("epoch")) is not None for row in rows) else "step"

    def curve(label: str, split: str, field: str, colour: str, dashes: str = "-") -> _Curve:
        return _Curve(label, _points(rows, split, field, position), colour, dashes)

    panels = {
        "Loss": [curve("train", "train", "loss", BLUE), curve("val", "val", "loss", ORANGE)],
        "Accuracy": [
            curve(f"{split} top-{k}", split, f"top{k}", colour, dashes)
            for split, colour in (("train", BLUE), ("val", ORANGE))
            for k, dashes in ((1, "-"), (5, "--"))
        ],
        "Learning rate": [curve("", split, "learning_rate", INK) for split in ("train", "val")],
    }
    panels = {title: [drawn for drawn in curves if drawn.points] for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError("The metrics rows hold no loss, accuracy or learning rate to plot.")
    is_stacked = width_inches < 6
    figure = new_figure(width_inches, 2.6 * len(panels) if is_stacked else 3.1)
    grid = (len(panels), 1) if is_stacked else (1, len(panels))
    for axes, (title, curves) in zip(figure.subplots(*grid, squeeze=False).flat, panels.items(), strict=True):
        style_axes(axes, title, grid="y")
        axes.set_xlabel(position)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if title == "Learning rate":
            # One line: where both splits log the rate, they log the same.
            x, y = np.array(curves[0].points).T
            axes.plot(x, y, color=INK, linewidth=1.7, marker="o" if len(x) == 1 else "")
        else:
            for drawn in curves:
                _draw_curve(axes, drawn)
            in_corner = "upper right" if title == "Loss" else "lower right"
            axes.legend(frameon=False, fontsize=SMALL_POINTS, labelcolor=INK, handlelength=2.4, loc=in_corner)
        if title == "Accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.margins(y=0.12)
            for drawn in curves:
                _name_last_value(axes, drawn)
        else:
            axes.set_ylim(bottom=0)
    return figure


def _draw_curve(axes: Axes, curve: _Curve) -> None:
    x, y = np.array(curve.points).T
    if len(x) >= SMOOTHED_FROM_POINTS:
        axes.plot(x, y, color=curve.colour, alpha=0.22, linewidth=0.8)
        window = np.ones(max(3, len(x) // 50))
        # Divided by the points under the window, so that the ends are means too and not pulled to 0.
        y = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    marker = "o" if len(x) <= 30 else ""
    style: dict[str, Any] = {"linewidth": 1.7, "marker": marker, "markersize": 3}
    axes.plot(x, y, curve.dashes, color=curve.colour, label=curve.label, **style)


def _name_last_value(axes: Axes, curve: _Curve) -> None:
    if curve.label.startswith("val"):
        style: dict[str, Any] = {"ha": "right", "fontsize": TEXT_POINTS, "fontweight": "bold"}
        text = percent_text(curve.points[-1][1])
        axes.annotate(text, curve.points[-1], (2, 6), textcoords="offset points", color=curve.colour, **style)


def _points(
    rows: Sequence[Mapping[str, Any]], split: str, field: str, position: str
) -> list[tuple[float, float]]:
    values: dict[float, float] = {}
    for row in rows:
        x, y = finite_number(row.get(position)), finite_number(row.get(field))
        if row.get("split") == split and x is not None and y is not None:
            values[x] = y
    return sorted(values.items())
