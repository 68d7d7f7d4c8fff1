"""Accuracy in groups of images of a kind, a small panel a property."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.image_properties import PropertyGroup
from evaluation.plot_style import BLUE, INK, MUTED, SMALL_POINTS, WIDE_INCHES, new_figure, style_axes

MAX_COLUMNS = 3


@dataclass(frozen=True)
class PropertyPanel:
    """title, and how a value of the property is written."""

    title: str
    groups: Sequence[PropertyGroup]
    value_text: Callable[[float], str]


def plot_properties(panels: Mapping[str, PropertyPanel], *, width_inches: float = WIDE_INCHES) -> Figure:
    """Top-1 of each group with its 95% interval; a hollow ring is what its classes alone would give.

    All panels have one scale. ValueError for no panel.
    """
    if not panels:
        raise ValueError("There is no property to plot.")
    columns = 1 if width_inches < 6 else min(MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    # A lone panel need not be as wide as the page.
    figure = new_figure(width_inches if columns != 1 or width_inches < 6 else 4.0, 2.5 * rows)
    all_axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    ends = [end for panel in panels.values() for group in panel.groups for end in group.interval]
    for axes, panel in zip(all_axes, panels.values(), strict=False):
        _draw_panel(axes, panel)
    all_axes[0].set_ylim(max(0, min(ends) - 0.04), min(1.01, max(ends) + 0.04))
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes in all_axes[::columns]:
        axes.set_ylabel("top-1")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=1 if width_inches < 6 else 2,
                  frameon=False, fontsize=SMALL_POINTS, labelcolor=INK)  # fmt: skip
    return figure


def _draw_panel(axes: Axes, panel: PropertyPanel) -> None:
    places = np.arange(len(panel.groups))
    top1 = np.array([group.top1 for group in panel.groups])
    intervals = np.array([group.interval for group in panel.groups])
    style_axes(axes, panel.title, grid="y")
    expected = [group.expected_top1 for group in panel.groups]
    axes.plot(places, expected, "o", color=MUTED, markersize=8, markerfacecolor="none", markeredgewidth=1.1,
              label="what the group's classes alone would give")  # fmt: skip
    axes.vlines(places, intervals[:, 0], intervals[:, 1], color=BLUE, linewidth=1.4)
    axes.plot(
        places, top1, "o-", color=BLUE, markersize=5, linewidth=1.2, label="top-1, with its 95% interval"
    )
    axes.set_xticks(places, [_range_text(group, panel.value_text) for group in panel.groups])
    axes.tick_params(axis="x", labelsize=SMALL_POINTS, labelbottom=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, len(places) - 0.5)


def _range_text(group: PropertyGroup, value_text: Callable[[float], str]) -> str:
    low, high = value_text(group.low), value_text(group.high)
    return low if low == high else f"{low}\n–{high}"
