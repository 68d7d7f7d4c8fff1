"""Which classes are taken for which."""

import html
from dataclasses import asdict

from matplotlib.figure import Figure

from evaluation.metrics import distinct_names
from evaluation.report.plots import MAX_NAMED_CLASSES, labels_per_block, plot_confusion_matrix
from evaluation.report.section import ReportContent, Section, draw_plot, plot_html
from evaluation.text import count_text, percent_text

MAX_PHONE_CLASSES = 12  # of a confusion matrix that is legible on a phone without scrolling


def build(content: ReportContent) -> Section:
    results, names = content.results, distinct_names(content.class_names)

    def plot_matrix(width_inches: float) -> Figure:
        return plot_confusion_matrix(results.confusion, content.class_names, width_inches=width_inches)

    must_scroll = MAX_PHONE_CLASSES < len(names) <= MAX_NAMED_CLASSES
    alt = "Confusion matrix: rows are true classes, columns predicted ones"
    plot = draw_plot(alt, plot_matrix, has_phone=not must_scroll)
    note = (
        "Each row is a true class, each column what it was taken for, in percent of the row. Blue is right; "
        "orange is wrong, on a scale that lifts small shares."
    )
    if (block := labels_per_block(len(names))) > 1:
        note = (
            f"{block} neighbouring labels share a row and a column. Blue stays in its block, right or not; "
            "orange leaves it, on a scale that lifts small shares."
        )
    pairs = [
        {
            "true": content.class_names[pair.true_label],
            "predicted": content.class_names[pair.predicted_label],
            **asdict(pair),
        }
        for pair in results.most_confused
    ]
    body = (
        f'<div class="side-by-side">\n{plot_html(plot)}\n<div class="card pairs">'
        f"<h3>Most confused, true → predicted</h3>\n{_pairs_html(content)}</div>\n</div>"
    )
    return Section(
        "Confusion matrix",
        note,
        body,
        files={"confusion_matrix.png": plot.wide_png},
        figures={"most_confused_pairs": pairs, "confusion_matrix": results.confusion.tolist()},
    )


def _pairs_html(content: ReportContent) -> str:
    names = distinct_names(content.class_names)
    pairs = "\n".join(
        f"<li>{html.escape(names[pair.true_label])} → {html.escape(names[pair.predicted_label])}"
        f"<span>{count_text(pair.count, 'image')}, {percent_text(pair.fraction)} of the class</span>"
        f'<i class="bar" style="--share:{pair.fraction:.4f}"></i></li>'
        for pair in content.results.most_confused
    )
    return f"<ol>\n{pairs}\n</ol>" if pairs else "<p>Not one image was misclassified.</p>"
