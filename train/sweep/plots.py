"""The plots of a sweep's page, PNGs that stay legible on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

ACCENT, GOOD, BAD, MUTED = "#1f6fb4", "#0b7a5c", "#b8321a", "#5b6675"
DOTS_PER_INCH = 160

Row = dict[str, Any]  # of sweep.json: number, state, value, parameters


def history(rows: list[Row], figure_of: Callable[[float], str], lower_is_better: bool) -> str:
    """Value of each trial, pruned ones marked, and the best so far; a data URI."""
    figure, axes = _new(5.4, 3.5)
    complete = [row for row in rows if row["state"] == "complete"]
    if complete:
        values = [row["value"] for row in complete]
        best_of = min if lower_is_better else max
        best = [best_of(values[: place + 1]) for place in range(len(values))]
        numbers = [row["number"] for row in complete]
        axes.step(numbers, best, where="post", color=GOOD, lw=1.6, label="best so far", zorder=1)
    _dots(axes, rows, lambda row: row["number"], figure_of, lower_is_better)
    for place, row in enumerate(row for row in rows if row["state"] == "failed"):
        label = "failed" if place == 0 else None
        axes.axvline(row["number"], color=MUTED, lw=1, ls=":", label=label, zorder=0)
    axes.set_xlabel("trial")
    axes.set_xlim(0.4, max(row["number"] for row in rows) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(
        frameon=False, fontsize=9.5, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2
    )
    return _data_uri(figure)


def importance(shares: dict[str, float]) -> str:
    """Bars, the largest on top."""
    figure, axes = _new(5.4, 0.9 + 0.42 * len(shares))
    names = list(reversed(shares))
    bars = axes.barh(names, [shares[name] for name in names], color=ACCENT, height=0.6)
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=4, fontsize=10)
    axes.set_xlim(0, max([*shares.values(), 0.01]) * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)
    return _data_uri(figure)


def scatter(
    rows: list[Row], key: str, is_log: bool, figure_of: Callable[[float], str], lower_is_better: bool
) -> str:
    """Value over one parameter."""
    figure, axes = _new(4.2, 3.1)
    chosen = {row["number"]: row["parameters"].get(key) for row in rows if row["value"] is not None}
    if any(isinstance(value, str) for value in chosen.values()):
        names = sorted({str(value) for value in chosen.values()})
        chosen = {number: names.index(str(value)) for number, value in chosen.items()}
        axes.set_xticks(range(len(names)), [name if len(name) < 16 else name[:15] + "…" for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif is_log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    _dots(axes, rows, lambda row: chosen[row["number"]], figure_of, lower_is_better)
    axes.set_xlabel(key)
    return _data_uri(figure)


def _dots(
    axes: Axes,
    rows: list[Row],
    place_of: Callable[[Row], Any],
    figure_of: Callable[[float], str],
    lower_is_better: bool,
) -> None:
    """Trials at their values.

    The axis is made for those that trained to their end. Pruned ones were cut off long before, and would
    press the others together: where they lie beyond the axis they stand at its edge.
    """
    axes.grid(axis="y", color="#e7ebf0", lw=0.8)
    axes.set_axisbelow(True)
    complete = [row for row in rows if row["state"] == "complete"]
    pruned = [row for row in rows if row["state"] == "pruned" and row["value"] is not None]
    values = [row["value"] for row in complete or pruned]
    margin = 0.12 * (max(values) - min(values)) or 0.02 * abs(values[0]) or 0.01
    low, high = min(values) - margin, max(values) + margin
    axes.set_ylim(low, high)
    axes.scatter(
        [place_of(row) for row in complete],
        [row["value"] for row in complete],
        color=ACCENT,
        s=34,
        label="to the end",
        zorder=2,
    )
    inside = [row for row in pruned if low <= row["value"] <= high]
    beyond = [row for row in pruned if not low <= row["value"] <= high]
    hollow: dict[str, Any] = {
        "s": 34,
        "facecolors": "white",
        "edgecolors": BAD,
        "linewidths": 1.4,
        "zorder": 3,
    }
    label = "pruned"
    for some, marker in ((inside, "D"), (beyond, "^" if lower_is_better else "v")):
        if some:
            heights = [min(max(row["value"], low), high) for row in some]
            axes.scatter(
                [place_of(row) for row in some], heights, marker=marker, label=label, clip_on=False, **hollow
            )
            label = "_"  # once in the legend
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: figure_of(value)))


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab3bf")
    axes.tick_params(colors=MUTED, labelcolor="#1b2430", labelsize=10)
    return figure, axes


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
