"""Write a comparison: compare.html to read, compare.json, compare.md, compare.csv, and its plots as PNG.

Files are written under a temporary name and renamed, the page last: a reader never sees half of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evaluation.compare.comparison import Comparison
from evaluation.compare.page import PagePlots, render_page
from evaluation.compare.plots import class_differences, plot_class_differences, plot_curves, plot_trade_offs
from evaluation.compare.table import csv_table, markdown_table, markdown_text, model_text
from evaluation.files import utf8_bytes, write_file
from evaluation.metrics import confusion_matrix
from evaluation.plot_image import PlotImage, draw_plot
from evaluation.report.plots import MAX_NAMED_CLASSES, plot_confusion_matrix

MAX_PHONE_CLASSES = 12  # of a confusion matrix that is legible on a phone without scrolling


@dataclass(frozen=True)
class ComparisonFiles:
    """Where a comparison was written; plots: file name → path, those that there was something to draw for."""

    html: Path
    json: Path
    markdown: Path
    csv: Path
    plots: dict[str, Path]

    @property
    def paths(self) -> list[Path]:
        return [self.html, self.json, self.markdown, self.csv, *self.plots.values()]


def write_comparison(out_dir: Path, comparison: Comparison, *, split: str) -> ComparisonFiles:
    """Everything into out_dir, which is made if it is missing; plots of an earlier comparison go."""
    drawn = {
        "curves.png": _or_none("Curves of all runs: validation top-1 and loss, training loss, learning rate",
                               lambda width: plot_curves(comparison.runs, width_inches=width)),
        "trade_offs.png": _or_none("Top-1 of each run against parameters, FLOPs and images a second",
                                   lambda width: plot_trade_offs(comparison.runs, width_inches=width)),
        "confusion_matrix.png": _confusion_plot(comparison),
        "class_differences.png": _differences_plot(comparison),
    }  # fmt: skip
    page = render_page(comparison, PagePlots(*drawn.values()), split)
    out_dir.mkdir(parents=True, exist_ok=True)
    plots = {}
    for name, plot in drawn.items():
        if plot is None:
            (out_dir / name).unlink(missing_ok=True)  # it would pass for one of this comparison
        else:
            plots[name] = write_file(out_dir / name, plot.wide_png)
    return ComparisonFiles(
        plots=plots,
        csv=write_file(out_dir / "compare.csv", utf8_bytes(csv_table(comparison.runs))),
        markdown=write_file(out_dir / "compare.md", utf8_bytes(_markdown(comparison))),
        json=write_file(
            out_dir / "compare.json",
            utf8_bytes(json.dumps(as_json(comparison, split), indent=1, allow_nan=False) + "\n"),
        ),
        html=write_file(out_dir / "compare.html", utf8_bytes(page)),
    )


def _or_none(alt: str, plot: Callable[[float], Figure], has_phone: bool = True) -> PlotImage | None:
    try:
        return draw_plot(alt, plot, has_phone=has_phone)
    except ValueError:  # there is nothing to draw
        return None


def _confusion_plot(comparison: Comparison) -> PlotImage | None:
    """The report's plot, of the best run."""
    best = comparison.best
    if best is None or best.predictions is None:
        return None
    predictions = best.predictions
    matrix = confusion_matrix(predictions)
    return draw_plot(
        f"Confusion matrix of {best.name}: rows are true classes, columns predicted ones",
        lambda width: plot_confusion_matrix(matrix, predictions.class_names, width_inches=width),
        has_phone=not MAX_PHONE_CLASSES < predictions.num_classes <= MAX_NAMED_CLASSES,
    )


def _differences_plot(comparison: Comparison) -> PlotImage | None:
    first, second = comparison.best, comparison.second
    if not comparison.is_paired or first is None or second is None:
        return None
    return draw_plot(
        f"Top-1 of the classes in which {first.name} and {second.name} differ most",
        lambda width: plot_class_differences(first, second, width_inches=width),
    )


def _markdown(comparison: Comparison) -> str:
    lines = [markdown_table(comparison.runs)]
    lines += [f"- {markdown_text(words)}" for words in comparison.verdicts]
    return "\n".join(lines).rstrip() + "\n"


def as_json(comparison: Comparison, split: str) -> dict[str, Any]:
    """Fractions, counts, bytes, seconds; what is not known is not there."""
    best, second, baseline = comparison.best, comparison.second, comparison.baseline
    fields: dict[str, Any] = {
        "split": split,
        "is_paired": comparison.is_paired,
        "best": None if best is None else best.letter,
        "second": None if second is None else second.letter,
        "baseline": None if baseline is None else baseline.letter,
        "machine": comparison.machine or None,
        "notes": list(comparison.notes),
        "num_wrong_for_all": comparison.num_wrong_for_all,
        "runs": [
            {
                "letter": run.letter,
                "name": run.name,
                "source": run.record.source,
                "model": model_text(run),
                "checkpoint_sha256": run.record.checkpoint_sha256,
                "figures": run.figures,
                "notes": list(run.notes),
            }
            for run in comparison.runs
        ],
        "paired": [
            {"run": pair.run.letter, **asdict(pair.result), "words": pair.words} for pair in comparison.pairs
        ],
    }
    if comparison.is_paired and best is not None and second is not None:
        assert best.predictions is not None and second.predictions is not None
        fields["class_differences"] = [
            {"class": name, best.letter: top1, second.letter: other, "num_images": count}
            for name, top1, other, count in class_differences(best.predictions, second.predictions)
        ]
    return fields
