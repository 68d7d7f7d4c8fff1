"""Accuracy of every class: bars, and a table to sort."""

from collections.abc import Sequence
from dataclasses import asdict

from evaluation.metrics import ClassMetrics, distinct_names
from evaluation.plot_image import draw_plot, plot_html
from evaluation.report.plots import plot_per_class_accuracy
from evaluation.report.section import ReportContent, Section, cell_html
from evaluation.text import interval_text, percent_text


def build(content: ReportContent) -> Section:
    names = distinct_names(content.class_names)
    has_top5 = len(names) > 5
    plot = draw_plot(
        "Top-1 accuracy of each class as bars with intervals",
        lambda width: plot_per_class_accuracy(content.results.table, width_inches=width),
    )
    heads = [("Class", ""), ("Images", "wide"), ("Top-1", ""), ("95% interval", "wide")]
    heads += [("Precision", "wide"), ("F1", "wide")]
    heads += [("Top-5", "wide")] if has_top5 else []
    heads += [("Most often mistaken for", "")]
    head = "".join(
        f'<th scope="col" class="{width}" aria-sort="{"ascending" if text == "Top-1" else "none"}">'
        f'<button type="button">{text}</button></th>'
        for text, width in heads
    )
    # The classes that need work come first, those without a figure last.
    ordered = sorted(content.results.table, key=lambda row: (row.top1 is None, row.top1, row.label))
    rows = "\n".join(_class_row(row, names, has_top5) for row in ordered)
    measured = [(names[row.label], percent_text(row.top1)) for row in ordered if row.top1 is not None]
    note = "The hardest class is {} with {} top-1".format(*measured[0])
    if len(measured) > 1:
        note += ", the easiest {} with {}".format(*measured[-1])
    body = (
        f'{plot_html(plot)}\n<div class="card table" tabindex="0" role="region" '
        f'aria-label="Accuracy of each class"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    results = content.results
    note += (
        f". Top-1 is a class's recall; precision is the share of its answers that are right, F1 their "
        f"harmonic mean. Means over the classes: recall {percent_text(results.macro_recall)}, precision "
        f"{percent_text(results.macro_precision)}, F1 {percent_text(results.macro_f1)}."
    )
    macro = {
        "macro_recall": results.macro_recall,
        "macro_precision": results.macro_precision,
        "macro_f1": results.macro_f1,
    }
    return Section(
        "Accuracy of each class",
        note,
        body,
        files={"per_class_accuracy.png": plot.wide_png},
        figures={**macro, "per_class": [asdict(row) for row in results.table]},
        metrics=macro,
    )


def _class_row(row: ClassMetrics, names: Sequence[str], has_top5: bool) -> str:
    cells = [
        cell_html(names[row.label], names[row.label]),
        cell_html(f"{row.count:,}", row.count, "number wide"),
    ]
    if row.top1 is None or row.top1_interval is None or row.top5 is None:
        cells += [cell_html("–", ""), *[cell_html("–", "", "wide")] * (3 + has_top5), cell_html("–", "")]
        return f"<tr>{''.join(cells)}</tr>"
    share = f' style="--share:{row.top1:.4f}"'
    cells.append(cell_html(percent_text(row.top1), f"{row.top1:.6f}", "number accuracy", share))
    cells.append(cell_html(interval_text(row.top1_interval), f"{row.top1_interval[0]:.6f}", "number wide"))
    for share_of_answers in (row.precision, row.f1):
        if share_of_answers is None:
            cells.append(cell_html("–", "", "wide"))
        else:
            cells.append(cell_html(percent_text(share_of_answers), f"{share_of_answers:.6f}", "number wide"))
    if has_top5:
        cells.append(cell_html(percent_text(row.top5), f"{row.top5:.6f}", "number wide"))
    if row.most_common_error is None:
        cells.append(cell_html("never", ""))
    else:
        error = names[row.most_common_error]
        cells.append(cell_html(f"{error} ({row.most_common_error_count:,})", error))
    return f"<tr>{''.join(cells)}</tr>"
