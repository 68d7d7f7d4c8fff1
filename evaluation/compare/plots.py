"""The figures of a comparison: curves overlaid, accuracy against what it costs, classes that differ.

A run has a letter, a colour and a dash pattern, the same in all figures; the letter stands at the end of its
line, so that no figure needs colour to be read. The confusion matrix is the report's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from evaluation.compare.columns import rate_text
from evaluation.compare.curves import Curve, curve, smoothed
from evaluation.compare.figures import ComparedRun
from evaluation.metrics import Predictions
from evaluation.plot_style import (
    BLUE,
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
from evaluation.text import percent_text

# Okabe and Ito's palette, darkened where white is behind it: apart with every common colour blindness.
COLOURS = (BLUE, ORANGE, GREEN, "#a2478f", "#b98900", "#3f9fd8", INK, "#8a8f98")
DASHES: tuple[Any, ...] = ("-", "-", "-", "-", (0, (5, 1.6)), (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (1.6, 1.2)))
SMOOTHED_FROM_POINTS = 60
SPREAD_POINTS = 8.5  # that letters at the ends of lines keep from each other
MAX_CLASSES = 12

PANELS: tuple[tuple[str, str, str], ...] = (
    ("Validation top-1", "val", "top1"),
    ("Validation loss", "val", "loss"),
    ("Training loss", "train", "loss"),
    ("Learning rate", "train", "learning_rate"),
)
COSTS: tuple[tuple[str, str, bool], ...] = (
    ("num_parameters", "parameters", True),
    ("forward_flops", "FLOPs of an image", True),
    ("inference_images_per_second", "images/s, inference", False),
)


def colour_of(run: ComparedRun) -> str:
    return COLOURS[(ord(run.letter) - ord("A")) % len(COLOURS)]


def plot_curves(runs: Sequence[ComparedRun], *, width_inches: float = WIDE_INCHES) -> Figure:
    """Validation top-1 and loss, training loss, learning rate over the epochs of all runs.

    Many training rows are drawn as their running mean over a pale original. ValueError where no run has any.
    """
    panels = []
    for title, split, field in PANELS:
        curves = [(run, drawn) for run in runs if len(drawn := curve(run.record.rows, split, field))]
        if curves:
            panels.append((title, curves))
    if not panels:
        raise ValueError("No run has a row with a loss, an accuracy or a learning rate: there are no curves.")
    is_phone = width_inches < 6
    num_columns = 1 if is_phone else min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    drawn_runs = [run for run in runs if any(run is other for _, curves in panels for other, _ in curves)]
    legend_columns = 1 if is_phone else 3
    legend_inches = 0.2 * -(-len(drawn_runs) // legend_columns) + 0.1
    figure = new_figure(width_inches, 2.75 * num_rows + legend_inches)
    all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, (title, curves) in zip(all_axes, panels, strict=False):
        _draw_panel(axes, title, curves)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    # On a phone the runs' names are longer than the figure is wide.
    _legend(figure, drawn_runs, legend_columns, 34 if is_phone else 30)
    return figure


def _draw_panel(axes: Axes, title: str, curves: Sequence[tuple[ComparedRun, Curve]]) -> None:
    style_axes(axes, title, grid="y")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ends = []
    for run, drawn in curves:
        colour, values = colour_of(run), drawn.values
        if title == "Training loss" and len(drawn) >= SMOOTHED_FROM_POINTS:
            axes.plot(drawn.epochs, values, color=colour, alpha=0.2, linewidth=0.7)
            values = smoothed(values, max(5, len(values) // 20))
        marker = "o" if len(drawn) == 1 or (title.startswith("Validation") and len(drawn) <= 20) else ""
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": _dashes(run),
            "linewidth": 1.7,
            "marker": marker,
        }
        axes.plot(drawn.epochs, values, markersize=3, **style)
        ends.append((run, float(drawn.epochs[-1]), float(values[-1])))
    if title == "Validation top-1":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.margins(y=0.12)
    elif title == "Learning rate":
        axes.set_ylim(bottom=0)
    else:
        _ignore_outliers(axes, [drawn.values for _, drawn in curves])
    axes.margins(x=0.04)
    _name_ends(axes, ends)


def _ignore_outliers(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """A loss that diverged, or began so, does not press all others to the floor: it leaves the panel."""
    together = np.concatenate(values)
    most = 2.5 * max(float(np.median(series)) for series in values)
    if 0 < most < together.max():
        low = float(together.min())
        axes.set_ylim(low - 0.08 * (most - low), most)
    else:
        axes.margins(y=0.08)


def _name_ends(axes: Axes, ends: Sequence[tuple[ComparedRun, float, float]]) -> None:
    """A letter at the end of each line, moved apart where lines end together."""
    low, high = axes.get_ylim()
    places = [(x, float(np.clip(y, low, high))) for _, x, y in ends]
    for (run, _, _), place, shift in zip(ends, places, _shifts(axes, places, 0.06), strict=True):
        axes.annotate(
            run.letter, place, (5, shift), textcoords="offset points", color=colour_of(run),
            fontsize=TEXT_POINTS, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def _shifts(axes: Axes, places: Sequence[tuple[float, float]], reach: float) -> list[float]:
    """By how many points texts at `places` (x, y) are to be raised, so that none lies on another.

    reach: of the axes' width; what is further apart has nothing to do with each other.
    """
    figure = axes.get_figure()
    assert figure is not None
    height_points = axes.get_position().height * figure.get_figheight() * 72  # type: ignore[union-attr]
    to_axes = (axes.transData + axes.transAxes.inverted()).transform(np.array(places))
    shifts = [0.0] * len(places)
    left = sorted(range(len(places)), key=lambda index: to_axes[index, 0])
    while left:
        group = [index for index in left if to_axes[index, 0] - to_axes[left[0], 0] <= reach]
        left = left[len(group) :]
        group.sort(key=lambda index: to_axes[index, 1])
        heights = [float(to_axes[index, 1]) * height_points for index in group]
        moved = _apart(heights, SPREAD_POINTS)
        lift = max(0.0, -min(moved)) if min(heights) >= 0 else 0.0  # not below the axis
        for index, height, target in zip(group, heights, moved, strict=True):
            shifts[index] = target + lift - height
    return shifts


def _apart(places: Sequence[float], distance: float) -> list[float]:
    """Rising `places`, moved by little so that they are `distance` apart."""
    moved = list(places)
    for _ in range(20):
        for left, right in itertools.pairwise(range(len(moved))):
            if (lack := distance - (moved[right] - moved[left])) > 0:
                moved[left] -= lack / 2
                moved[right] += lack / 2
    return moved


def _dashes(run: ComparedRun) -> Any:
    return DASHES[(ord(run.letter) - ord("A")) % len(DASHES)]


def _legend(figure: Figure, runs: Sequence[ComparedRun], num_columns: int, longest: int) -> None:
    handles = [Line2D([], [], color=colour_of(run), linestyle=_dashes(run), linewidth=2) for run in runs]
    names = [plain_text(run.label, longest) for run in runs]
    figure.legend(
        handles, names, loc="outside upper left", ncols=num_columns, frameon=False, labelcolor=INK,
        fontsize=TEXT_POINTS, handlelength=2.6,
    )  # fmt: skip


def plot_trade_offs(runs: Sequence[ComparedRun], *, width_inches: float = WIDE_INCHES) -> Figure:
    """Top-1 against parameters, FLOPs and images/s, each on a logarithmic scale; the Pareto front is a line.

    Filled marks are on the front: no other run is as good in both and better in one. ValueError where no
    figure is known of two runs.
    """
    panels = []
    for key, title, low_is_better in COSTS:
        known = [run for run in runs if run.score is not None and run.figures.get(key, 0) > 0]
        if len(known) >= 2:
            panels.append((key, title, low_is_better, known))
    if not panels:
        raise ValueError("No two runs have both an accuracy and a cost: there is nothing to weigh.")
    is_phone = width_inches < 6
    grid = (len(panels), 1) if is_phone else (1, len(panels))
    figure = new_figure(width_inches, 2.7 * len(panels) if is_phone else 3.3)
    for axes, (key, title, low_is_better, known) in zip(
        figure.subplots(*grid, squeeze=False).flat, panels, strict=True
    ):
        _draw_trade_off(axes, key, title, low_is_better, known)
    return figure


def _draw_trade_off(
    axes: Axes, key: str, title: str, low_is_better: bool, runs: Sequence[ComparedRun]
) -> None:
    costs = np.array([run.figures[key] for run in runs], dtype=np.float64)
    top1 = np.array([run.score for run in runs], dtype=np.float64)
    front = pareto_front(costs if low_is_better else -costs, top1)
    style_axes(axes, f"Top-1 against {title}", grid="y")
    axes.set_xscale("log")
    order = np.flatnonzero(front)[np.argsort(costs[front], kind="stable")]
    axes.plot(costs[order], top1[order], color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)), zorder=1)
    for run, x, y, is_front in zip(runs, costs, top1, front, strict=True):
        face = colour_of(run) if is_front else "white"
        axes.plot(
            x, y, "o", markersize=8, markerfacecolor=face, markeredgecolor=colour_of(run), markeredgewidth=1.6
        )
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(x=0.18, y=0.2)
    low, high = axes.get_xlim()
    if high < 1.6 * low:  # networks of about one size: a scale that shows it
        axes.set_xlim(low / 1.3, high * 1.3)
    _name_marks(axes, runs, costs, top1)
    _few_ticks(axes)
    axes.set_xlabel(f"{title} ({'less' if low_is_better else 'more'} is better)")


def _name_marks(
    axes: Axes, runs: Sequence[ComparedRun], costs: NDArray[np.float64], top1: NDArray[np.float64]
) -> None:
    """Names beside the marks, towards the middle of the panel."""
    middle = np.sqrt(costs.min() * costs.max())
    shifts = _shifts(axes, list(zip(costs.tolist(), top1.tolist(), strict=True)), 1.0)
    for run, x, y, shift in zip(runs, costs, top1, shifts, strict=True):
        is_right = x > middle
        axes.annotate(
            plain_text(run.label, 20), (x, y), (-8 if is_right else 8, shift), textcoords="offset points",
            ha="right" if is_right else "left", va="center", fontsize=SMALL_POINTS, color=INK,
        )  # fmt: skip


def _few_ticks(axes: Axes) -> None:
    """Three or four round numbers; a log axis of less than a decade would have none, or ten that overlap."""
    low, high = axes.get_xlim()
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 2:
            break
    ticks = ticks[:: -(-len(ticks) // 4)] if len(ticks) > 4 else ticks
    axes.set_xticks(ticks)
    axes.set_xticks([], minor=True)
    if high < 1000:
        axes.set_xticklabels([rate_text(tick) for tick in ticks])
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def pareto_front(costs: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other one dominates: costs no more and gains no less, and one of these by something.

    costs, gains: float64 (n,); the lower cost and the higher gain are better. Returns bool (n,).
    """
    no_dearer = costs[:, None] <= costs[None, :]
    no_worse = gains[:, None] >= gains[None, :]
    better = (costs[:, None] < costs[None, :]) | (gains[:, None] > gains[None, :])
    is_beaten: NDArray[np.bool_] = np.any(no_dearer & no_worse & better, axis=0)
    return ~is_beaten


def plot_class_differences(
    first: ComparedRun, second: ComparedRun, *, width_inches: float = WIDE_INCHES
) -> Figure:
    """Top-1 of the classes in which two runs differ most, as two marks on a line each, largest first."""
    assert first.predictions is not None and second.predictions is not None
    rows = class_differences(first.predictions, second.predictions)[:MAX_CLASSES]
    figure = new_figure(width_inches, 0.95 + 0.27 * len(rows))
    axes = figure.add_subplot()
    positions = np.arange(len(rows), dtype=float)
    for position, (_, top1, other, _) in zip(positions, rows, strict=True):
        axes.hlines(position, min(top1, other), max(top1, other), color=MUTED, linewidth=1.6, zorder=1)
    marks: tuple[tuple[ComparedRun, Callable[[tuple[str, float, float, int]], float], str], ...] = (
        (second, lambda row: row[2], "s"),
        (first, lambda row: row[1], "o"),
    )
    for run, value, marker in marks:
        axes.plot([value(row) for row in rows], positions, marker, color=colour_of(run), markersize=6.5,
                  label=plain_text(run.label, 28), zorder=2)  # fmt: skip
    for position, (_, top1, other, count) in zip(positions, rows, strict=True):
        text = f"{100 * (top1 - other):+.1f}".replace("-", "−") if width_inches < 6 else (
            f"{100 * (top1 - other):+.1f} points ({percent_text(top1)} and {percent_text(other)} of "
            f"{count:,})"
        ).replace("-", "−")  # fmt: skip
        axes.text(1.03, position, text, va="center", fontsize=SMALL_POINTS, color=INK,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    longest = 34 if width_inches >= 6 else 15
    axes.set_yticks(positions, [plain_text(row[0], longest) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    style_axes(axes, grid="x")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("top-1 of the class", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=1 if width_inches < 6 else 2,
                  frameon=False, fontsize=TEXT_POINTS, labelcolor=INK)  # fmt: skip
    return figure


def class_differences(first: Predictions, second: Predictions) -> list[tuple[str, float, float, int]]:
    """(name, top-1 of the first, of the second, images) of each class that has images, most different "
    "first."""
    counts = np.bincount(first.labels, minlength=first.num_classes)
    shares = []
    for predictions in (first, second):
        right = predictions.labels[predictions.label_ranks == 0]
        shares.append(np.bincount(right, minlength=first.num_classes) / np.maximum(counts, 1))
    order = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")
    return [
        (first.class_names[label], float(shares[0][label]), float(shares[1][label]), int(counts[label]))
        for label in order.tolist()
        if counts[label]
    ]
