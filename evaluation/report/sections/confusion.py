"""Which classes are taken for which."""

import html
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure

from evaluation.confusion_groups import BothWays, cluster_order, confused_both_ways, confused_groups
from evaluation.metrics import distinct_names, softmax
from evaluation.plot_image import draw_plot, plot_html
from evaluation.report.plots import MAX_NAMED_CLASSES, classes_per_block, plot_confusion_matrix
from evaluation.report.section import ReportContent, Section, thumbnail_uri
from evaluation.text import count_text, percent_text

MAX_PHONE_CLASSES = 12  # of a confusion matrix that is legible on a phone without scrolling
NUM_PAIRS = 8
NUM_GROUPS = 8
PAIR_PIXELS = 144  # shown at 56


def build(content: ReportContent) -> Section:
    matrix, names = content.results.confusion, distinct_names(content.class_names)
    # A dozen names are found sooner in their own order; more of them tell more as clusters.
    is_clustered = len(names) > MAX_PHONE_CLASSES
    order = cluster_order(matrix) if is_clustered else None

    def plot_matrix(width_inches: float) -> Figure:
        return plot_confusion_matrix(matrix, content.class_names, width_inches=width_inches, order=order)

    must_scroll = MAX_PHONE_CLASSES < len(names) <= MAX_NAMED_CLASSES
    alt = "Confusion matrix: rows are true classes, columns predicted ones"
    plot = draw_plot(alt, plot_matrix, has_phone=not must_scroll)
    groups = confused_groups(matrix, NUM_GROUPS) if is_clustered else []
    parts = [f'<div class="side-by-side">\n{plot_html(plot)}\n{_pairs_card(content, names)}\n</div>']
    if groups:
        items = "\n".join(
            f"<li>{html.escape(', '.join(names[label] for label in group.labels))}"
            f"<span>{count_text(group.count, 'image')} taken for another of the group, "
            f"{percent_text(group.fraction)} of its images</span></li>"
            for group in groups
        )
        parts.append(
            f'<div class="card pairs groups"><h3>Groups taken for each other</h3>\n<ol>\n{items}\n</ol></div>'
        )
    named = content.class_names
    directed = [
        {"true": named[pair.true_label], "predicted": named[pair.predicted_label], **asdict(pair)}
        for pair in content.results.most_confused
    ]
    return Section(
        "Confusion matrix",
        _note(len(names), is_clustered),
        "\n".join(parts),
        files={"confusion_matrix.png": plot.wide_png},
        figures={
            "most_confused_pairs": directed,
            "confused_groups": [asdict(group) for group in groups],
            "class_order": None if order is None else order.tolist(),
            "confusion_matrix": matrix.tolist(),
        },
    )


def _note(num_classes: int, is_clustered: bool) -> str:
    if (block := classes_per_block(num_classes, is_clustered)) > 1:
        return (
            f"Classes that are taken for each other lie side by side (hierarchical clustering), {block} to a "
            "row and a column. Blue stays in its block, right or not; orange leaves it, on a scale that "
            "lifts small shares."
        )
    note = (
        "Each row is a true class, each column what it was taken for, in percent of the row. Blue is right; "
        "orange is wrong, on a scale that lifts small shares."
    )
    if is_clustered:
        note += " Classes that are taken for each other lie side by side (hierarchical clustering)."
    return note


def _pairs_card(content: ReportContent, names: list[str]) -> str:
    matrix = content.results.confusion
    counts = matrix.sum(axis=1)
    show = _pair_pictures(content)
    items = []
    for pair in confused_both_ways(matrix, NUM_PAIRS):
        share = pair.count / max(1, int(counts[pair.first]))
        first, second = html.escape(names[pair.first]), html.escape(names[pair.second])
        back = f"; {pair.count_back:,} the other way" if pair.count_back else "; none the other way"
        items.append(
            f"<li>{show(pair)}<div>{first} → {second}"
            f"<span>{count_text(pair.count, 'image')}, {percent_text(share)} of the class{back}</span>"
            f'<i class="bar" style="--share:{share:.4f}"></i></div></li>'
        )
    listing = (
        "<ol>\n{}\n</ol>".format("\n".join(items)) if items else "<p>Not one image was misclassified.</p>"
    )
    return f'<div class="card pairs pictured">\n<h3>Most confused, true → predicted</h3>\n{listing}</div>'


def _pair_pictures(content: ReportContent) -> Callable[[BothWays], str]:
    """Two small pictures of a pair: the surest mistake, and the surest right one of the other class."""
    if not content.num_grid_images:
        return lambda pair: ""  # no images are wanted
    predictions = content.predictions
    answers = predictions.predicted_labels

    def surest(true_label: int, predicted_label: int) -> int | None:
        rows = np.flatnonzero((predictions.labels == true_label) & (answers == predicted_label))
        if not len(rows):
            return None
        confidences = softmax(predictions.logits[rows]).max(axis=1)
        # Of equally sure ones the lower sample id, whatever the order of the rows.
        return int(rows[np.lexsort((predictions.sample_ids[rows], -confidences))[0]])

    def pictures(pair: BothWays) -> str:
        shown = []
        for row in (surest(pair.first, pair.second), surest(pair.second, pair.second)):
            if row is not None:
                sample_id = int(predictions.sample_ids[row])
                label = html.escape(content.class_names[int(predictions.labels[row])])
                uri = thumbnail_uri(np.asarray(content.read_image(sample_id)), PAIR_PIXELS)
                shown.append(f'<img alt="An image of {label}" title="sample {sample_id}" src="{uri}">')
        return f'<div class="two">{"".join(shown)}</div>'

    return pictures
