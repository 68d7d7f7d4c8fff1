"""The table of a comparison: which cells are the best, and the table as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from evaluation.compare.columns import COLUMNS, FURTHER, Column
from evaluation.compare.figures import ComparedRun
from evaluation.text import percent_text

DASH = "–"


def shown_columns(runs: Sequence[ComparedRun]) -> list[Column]:
    """Those that any run has a figure for."""
    return [column for column in COLUMNS if any(column.key in run.figures for run in runs)]


def cell(column: Column, run: ComparedRun) -> tuple[str, str]:
    """(the figure as text, a note under it); (dash, "") where it is not known."""
    if column.key not in run.figures:
        return DASH, ""
    return column.text(run.figures[column.key]), column.note(run.figures)


def best_cells(column: Column, runs: Sequence[ComparedRun]) -> set[str]:
    """Letters of the runs with the best figure of a line; empty where all are equal or not comparable."""
    known = [run for run in runs if column.key in run.figures]
    values = {run.letter: run.figures[column.key] for run in known}
    if column.better is None or len(set(values.values())) < 2:
        return set()
    if column.like is not None and len({run.figures.get(column.like) for run in known}) > 1:
        return set()
    best = (max if column.better == "high" else min)(values.values())
    return {letter for letter, value in values.items() if value == best}


def markdown_table(runs: Sequence[ComparedRun]) -> str:
    """A line a figure, a column a run."""
    lines = [_line(["", *(f"{run.letter}: {run.name}" for run in runs)]), _line(["---"] * (len(runs) + 1))]
    for column in shown_columns(runs):
        cells = []
        for run in runs:
            text, note = cell(column, run)
            cells.append(f"{text} ({note})" if note else text)
        lines.append(_line([f"{column.title} ({column.group.lower()})", *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """On one line, and neither a new cell nor markup of a page."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def csv_table(runs: Sequence[ComparedRun]) -> str:
    """A row a run; empty where a figure is not known."""
    keys = ["letter", "run", "source", "model"]
    for column in COLUMNS:
        keys.append(column.key)
        if column.text is percent_text:  # an accuracy has an interval
            keys += [f"{column.key}_{end}" for end in ("low", "high")]
    keys += FURTHER
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        names = {"letter": run.letter, "run": run.name, "source": run.record.source, "model": model_text(run)}
        writer.writerow({key: _harmless(value) for key, value in (names | run.figures).items()})
    return buffer.getvalue()


def _harmless(value: Any) -> Any:
    """Spreadsheets take a text that begins so for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def model_text(run: ComparedRun) -> str:
    """`timm resnet18`."""
    if run.record.recipe is None:
        return "model not known"
    model = run.record.recipe.model
    return f"{model.library} {model.name}"
