"""The figures of a data card: images a class, image sizes, aspect ratios, bytes an image.

Each function returns a `matplotlib.figure.Figure`; all take the width they may use in inches, so that the
same figure exists for a desktop and a phone. Train is blue and val orange throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from data_prep.stats.look import (
    BLUES,
    GRID,
    INK,
    MUTED,
    SMALL_POINTS,
    SPLIT_COLOURS,
    TEXT_POINTS,
    WIDE_INCHES,
    figure_text,
    new_figure,
    style_axes,
)

MAX_NAMED_CLASSES = 60  # beyond, a curve and the extremes
EXTREMES = 10
LOG_FROM_RATIO = 20  # largest class over the smallest
ASPECTS = {"1:3": 1 / 3, "1:2": 1 / 2, "3:4": 3 / 4, "1:1": 1, "4:3": 4 / 3, "2:1": 2, "3:1": 3}


def plot_class_counts(
    names: Sequence[str], counts: Mapping[str, np.ndarray], *, width_inches: float = WIDE_INCHES
) -> Figure:
    """Images a class and split: a bar a class for up to 60 classes, else the sorted curve and the extremes.

    counts: by split, int (classes,).
    """
    order = np.argsort(-np.sum(list(counts.values()), axis=0), kind="stable")
    if len(names) <= MAX_NAMED_CLASSES:
        return _plot_named_bars(names, counts, order, width_inches)
    is_even = all((part == part[0]).all() for part in counts.values())
    if width_inches < 6:
        figure = new_figure(width_inches, 2.4 if is_even else 2.4 + 2 * 2.9)
        panels = figure.subplots(1 if is_even else 3, 1, squeeze=False).ravel()
    elif is_even:
        figure = new_figure(width_inches, 1.9)
        panels = figure.subplots(1, 1, squeeze=False).ravel()
    else:
        figure = new_figure(width_inches, 3.3)
        panels = figure.subplots(1, 3, squeeze=False, width_ratios=(1.25, 1, 1)).ravel()
    _draw_curve(panels[0], counts, order)
    if not is_even:
        _draw_extremes(panels[1:], names, counts, order, width_inches if width_inches < 6 else 3.4)
    return figure


def _plot_named_bars(
    names: Sequence[str], counts: Mapping[str, np.ndarray], order: np.ndarray, width_inches: float
) -> Figure:
    num_columns = max(2, math.ceil(len(names) / 15)) if len(names) > 10 and width_inches >= 6 else 1
    num_rows = math.ceil(len(names) / num_columns)
    figure = new_figure(width_inches, 0.75 + 0.255 * num_rows)
    columns = figure.subplots(1, num_columns, squeeze=False).ravel()
    longest = (40, 26, 20, 16)[num_columns - 1] if width_inches >= 6 else 16
    for number, axes in enumerate(columns):
        rows = order[number * num_rows : (number + 1) * num_rows]
        _draw_bars(axes, names, counts, rows, longest, width_inches / num_columns)
        axes.set_ylim(num_rows - 0.4, -0.6)
    _name_splits(columns[0], counts)
    return figure


def _draw_bars(
    axes: Axes,
    names: Sequence[str],
    counts: Mapping[str, np.ndarray],
    rows: np.ndarray,
    longest: int,
    width_inches: float,
) -> None:
    """Stacked bars of the splits, with their numbers behind; on axes about so wide, with their names."""
    positions = np.arange(len(rows))
    largest = _largest(counts)
    start = np.zeros(len(rows))
    for split, part in counts.items():
        axes.barh(positions, part[rows], left=start, height=0.68, color=SPLIT_COLOURS[split], alpha=0.9)
        start += part[rows]
    texts = [" + ".join(f"{part[row]:,}" for part in counts.values()) for row in rows]
    for position, text in zip(positions, texts, strict=True):
        axes.annotate(text, (start[position], position), (4, 0), textcoords="offset points", va="center",
                      fontsize=SMALL_POINTS, color=MUTED)  # fmt: skip
    shown = [figure_text(names[row], longest) for row in rows]
    axes.set_yticks(positions, shown)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Room for the numbers: axes grow and shrink with their figure, text does not.
    bars_inches = max(width_inches - 0.07 * max(map(len, shown), default=0) - 0.3, 0.8)
    share = min(0.65, (0.1 + 0.062 * max(map(len, texts), default=0)) / bars_inches)
    axes.set_xlim(0, largest / (1 - share))
    style_axes(axes, grid="x")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _name_splits(axes: Axes, counts: Mapping[str, np.ndarray]) -> None:
    for number, split in enumerate(counts):
        axes.annotate("■ " + split, (0, 1), (number * 45, 4), xycoords="axes fraction",
                      textcoords="offset points", color=SPLIT_COLOURS[split], fontsize=TEXT_POINTS,
                      fontweight="bold", annotation_clip=False)  # fmt: skip


def _draw_curve(axes: Axes, counts: Mapping[str, np.ndarray], order: np.ndarray) -> None:
    """Images a class, classes sorted by their number of images; each split as an area of its own."""
    num_classes = len(order)
    ranks = np.arange(num_classes)
    for split, part in counts.items():
        # Each split sorted by itself: as a curve the jumble of the smaller one would be noise.
        values = np.sort(part)[::-1]
        axes.fill_between(ranks, values, step="mid", color=SPLIT_COLOURS[split], alpha=0.16, linewidth=0)
        axes.step(ranks, values, where="mid", color=SPLIT_COLOURS[split], linewidth=1.8)
    largest = max(int(part.max()) for part in counts.values())
    smallest = min(int(part[part > 0].min(initial=largest)) for part in counts.values())
    if largest > LOG_FROM_RATIO * max(smallest, 1):
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, largest * 1.6)
    else:
        axes.set_ylim(0, largest * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(-0.5, num_classes - 0.5)
    style_axes(axes, "Images a class", grid="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"{num_classes:,} classes, largest first")
    for split, part in counts.items():
        values = np.sort(part)[::-1]
        axes.annotate(split, (num_classes * 0.985, values[int(num_classes * 0.985) - 1]), (0, 4),
                      textcoords="offset points", color=SPLIT_COLOURS[split], ha="right",
                      fontsize=TEXT_POINTS, fontweight="bold")  # fmt: skip


def _largest(counts: Mapping[str, np.ndarray]) -> int:
    """Images of the largest class, all splits together; at least 1."""
    return max(int(np.sum(list(counts.values()), axis=0).max()), 1)


def _draw_extremes(
    panels: np.ndarray,
    names: Sequence[str],
    counts: Mapping[str, np.ndarray],
    order: np.ndarray,
    width_inches: float,
) -> None:
    for axes, rows, title in (
        (panels[0], order[:EXTREMES], f"{EXTREMES} largest"),
        (panels[1], order[-EXTREMES:], f"{EXTREMES} smallest"),
    ):
        _draw_bars(axes, names, counts, rows, 24, width_inches)
        axes.set_xticks([])
        style_axes(axes, title)
        axes.tick_params(axis="y", labelcolor=INK, labelsize=SMALL_POINTS)


def plot_images(
    indexes: Mapping[str, np.ndarray], *, width_inches: float = WIDE_INCHES, columns: int = 4
) -> Figure:
    """Width × height, longer side, aspect ratio and bytes of the images, in `columns` columns of panels.

    indexes: by split, INDEX_DTYPE (samples,).
    """
    num_rows = math.ceil(4 / columns)
    figure = new_figure(width_inches, (2.9 if columns > 1 else 2.6) * num_rows)
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    width = {split: index["width"].astype(float) for split, index in indexes.items()}
    height = {split: index["height"].astype(float) for split, index in indexes.items()}
    _draw_sizes(panels[0], np.concatenate(list(width.values())), np.concatenate(list(height.values())))
    longer = {split: np.maximum(width[split], height[split]) for split in indexes}
    _draw_shares(panels[1], longer, _number_edges(longer))
    style_axes(panels[1], "Longer side, pixels", grid="y")
    aspects = {
        split: np.log2(np.maximum(width[split], 1) / np.maximum(height[split], 1)) for split in indexes
    }
    _draw_shares(panels[2], {split: aspects[split].clip(-2, 2) for split in indexes}, np.linspace(-2, 2, 50))
    style_axes(panels[2], "Aspect ratio, width : height", grid="y")
    panels[2].xaxis.set_major_locator(FixedLocator([math.log2(value) for value in ASPECTS.values()]))
    panels[2].xaxis.set_major_formatter(FixedFormatter(list(ASPECTS)))
    kilobytes = {split: index["length"] / 1e3 for split, index in indexes.items()}
    _draw_shares(panels[3], kilobytes, _number_edges(kilobytes))
    style_axes(panels[3], "Size of an image, kB", grid="y")
    return figure


def _draw_sizes(axes: Axes, width: np.ndarray, height: np.ndarray) -> None:
    """Width × height as cells, darker where more images lie."""
    limit = float(max(width.max(initial=1), height.max(initial=1))) * 1.06
    edges = np.linspace(0, limit, 54)
    density, _, _ = np.histogram2d(width, height, bins=(edges, edges))
    axes.plot([0, limit], [0, limit], color=GRID, linewidth=1, zorder=0)
    cells = np.ma.masked_equal(density.T, 0)
    axes.pcolormesh(edges, edges, cells, cmap=BLUES, norm=LogNorm(1, max(float(density.max()), 2)))
    style_axes(axes, "Width × height, pixels")
    for side in ("left", "bottom"):
        axes.spines[side].set(visible=True, color=GRID)
    axes.set_aspect("equal", anchor="NW")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    sizes, uses = np.unique(np.stack([width, height], axis=1), axis=0, return_counts=True)
    if len(sizes):
        common = sizes[uses.argmax()]
        share = uses.max() / len(width)
        rounded = math.floor(share * 1000) / 10  # 99.98% are not 100%
        text = f"{rounded:g}% are\n{common[0]:.0f} × {common[1]:.0f}"
        if share >= 0.05:
            axes.text(
                0.05, 0.95, text, transform=axes.transAxes, va="top", fontsize=SMALL_POINTS, color=MUTED
            )


def _draw_shares(axes: Axes, values: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
    """Shares of a split's images by value: the first split filled, the others as lines over it."""
    for number, (split, part) in enumerate(values.items()):
        shares = np.histogram(part.clip(edges[0], edges[-1]), edges)[0] / max(len(part), 1)
        colour = SPLIT_COLOURS[split]
        if number == 0:
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.75, label=split)
        else:
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=split)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=SMALL_POINTS, labelcolor=INK, handlelength=1.2, loc="best")


def _number_edges(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """About 40 bins up to the 99.5th percentile; what lies above counts into the last."""
    merged = np.concatenate(list(values.values()))
    if not len(merged):
        return np.array([0.0, 1.0])
    low, high = float(merged.min()), float(np.quantile(merged, 0.995))
    if high - low < 0.02 * high:  # all alike: one bar amid some room
        low, high = high * 0.8, high * 1.2
    return np.linspace(low - (high - low) * 0.02, high + (high - low) * 0.02, 42)
