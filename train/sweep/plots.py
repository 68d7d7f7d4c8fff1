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
    figure, axes = _new(6.2, 3.6)
    complete = [(row["number"], row["value"]) for row in rows if row["state"] == "complete"]
    pruned = [(r["number"], r["value"]) for r in rows if r["state"] == "pruned" and r["value"] is not None]
    failed = [row["number"] for row in rows if row["state"] == "failed"]
    if complete:
        best_of = min if lower_is_better else max
        values = [value for _, value in complete]
        best = [best_of(values[: place + 1]) for place in range(len(values))]
        numbers = [number for number, _ in complete]
        axes.step(numbers, best, where="post", color=GOOD, lw=1.6, label="best so far", zorder=1)
        axes.scatter(numbers, values, color=ACCENT, s=34, label="to the end", zorder=2)
    if pruned:
        numbers, values = [number for number, _ in pruned], [value for _, value in pruned]
        axes.scatter(numbers, values, marker="D", **_hollow(), label="pruned", zorder=2)
    for place, number in enumerate(failed):
        label = "failed" if place == 0 else None
        axes.axvline(number, color=MUTED, lw=1, ls=":", label=label, zorder=0)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish_values(axes, figure_of)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
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


def scatter(rows: list[Row], key: str, is_log: bool, figure_of: Callable[[float], str]) -> str:
    """Value over one parameter."""
    figure, axes = _new(4.2, 3.1)
    points = [row for row in rows if row["value"] is not None and row["state"] in ("complete", "pruned")]
    chosen = {row["number"]: row["parameters"].get(key) for row in points}
    if any(isinstance(value, str) for value in chosen.values()):
        names = sorted({str(value) for value in chosen.values()})
        chosen = {number: names.index(str(value)) for number, value in chosen.items()}
        axes.set_xticks(range(len(names)), [name if len(name) < 16 else name[:15] + "…" for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif is_log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    styles = {"complete": {"color": ACCENT, "s": 34}, "pruned": {"marker": "D", **_hollow()}}
    for state, style in styles.items():
        some = [row for row in points if row["state"] == state]
        axes.scatter([chosen[r["number"]] for r in some], [r["value"] for r in some], **style)
    axes.set_xlabel(key)
    _finish_values(axes, figure_of)
    return _data_uri(figure)


def _hollow() -> dict[str, Any]:
    return {"s": 30, "facecolors": "white", "edgecolors": BAD, "linewidths": 1.4}


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab3bf")
    axes.tick_params(colors=MUTED, labelcolor="#1b2430", labelsize=10)
    return figure, axes


def _finish_values(axes: Axes, figure_of: Callable[[float], str]) -> None:
    axes.grid(axis="y", color="#e7ebf0", lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: figure_of(value)))


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
