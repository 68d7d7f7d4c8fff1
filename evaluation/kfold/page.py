"""The page and the JSON of a cross-validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_prep.page import details, page, paragraph, section, table, tiles
from evaluation.kfold.results import KfoldResults
from evaluation.metrics import distinct_names
from evaluation.text import count_text, interval_text, percent_text

SPREAD_NOTE = (
    "The standard deviation says how much folds differ. It is no error of the mean: any two models share "
    "most of their training images, and one cross-validation gives no unbiased estimate of that error "
    "(Bengio and Grandvalet, 2004)."
)


def kfold_page(
    title: str,
    results: KfoldResults,
    class_names: Sequence[str],
    facts: Sequence[tuple[str, str]],
    warnings: Sequence[str] = (),
) -> str:
    """All of it, self-contained; `facts` are looked up in a table at the end, `warnings` come first."""
    pooled, num_folds = results.pooled, len(results.folds)
    has_top5 = len(class_names) > 5
    figures = [("top1", "Top-1", pooled.top1, pooled.top1_interval)]
    figures += [("top5", "Top-5", pooled.top5, pooled.top5_interval)] if has_top5 else []
    headline = [
        (
            f"{name}, mean of {num_folds} folds",
            f"{results.mean[key]:.1%}",
            f"± {100 * results.std[key]:.1f} points, one standard deviation",
        )
        for key, name, _, _ in figures
    ]
    headline += [
        (f"{name}, all images", percent_text(value), f"95% interval {interval_text(interval)}")
        for _, name, value, interval in figures
    ]
    lede = (
        f"{count_text(pooled.num_samples, 'training image')} in {num_folds} folds: each image was judged by "
        "the one model that had not seen it."
    )
    return page(
        title,
        "Cross-validation",
        "".join(paragraph(words, "lede") for words in (*warnings, lede)) + tiles(headline, is_headline=True),
        [
            section("Folds", SPREAD_NOTE, _folds_table(results, has_top5)),
            section("Accuracy of each class", "Over all folds.", _class_table(results, class_names)),
            section("Details", "", details(facts)),
        ],
        "Intervals are 95% Wilson score intervals, which take images for independent. Each figure is of the "
        "last epoch of its fold. kfold.json beside this page holds all figures as fractions; oof.npz the "
        "predictions.",
        is_sortable=True,
    )


def spread_text(mean: float, std: float) -> str:
    """ "76.3 ± 1.2%"."""
    return f"{100 * mean:.1f} ± {100 * std:.1f}%"


def _folds_table(results: KfoldResults, has_top5: bool) -> str:
    heads = ["Fold", "Images", "Top-1"] + ["Top-5"] * has_top5
    rows = []
    for figures in results.folds:
        row: list[tuple[str, object]] = [
            (str(figures.fold), figures.fold),
            (f"{figures.num_samples:,}", figures.num_samples),
            (percent_text(figures.top1), figures.top1),
        ]
        rows.append(row + ([(percent_text(figures.top5), figures.top5)] if has_top5 else []))
    return table(heads, rows, "Accuracy of each fold")


def _class_table(results: KfoldResults, class_names: Sequence[str]) -> str:
    names = distinct_names(class_names)
    rows: list[list[tuple[str, object]]] = []
    for row in sorted(results.pooled.table, key=lambda row: (row.top1 is None, row.top1, row.label)):
        if row.top1 is None or row.top1_interval is None:
            continue
        error = "never" if row.most_common_error is None else names[row.most_common_error]
        shown = error if row.most_common_error is None else f"{error} ({row.most_common_error_count:,})"
        rows.append(
            [
                (names[row.label], names[row.label]),
                (f"{row.count:,}", row.count),
                (percent_text(row.top1), row.top1),
                (interval_text(row.top1_interval), row.top1_interval[0]),
                (shown, error),
            ]
        )
    heads = ["Class", "*Images", "Top-1", "*95% interval", "Most often mistaken for"]
    return table(heads, rows, "Accuracy of each class")


def kfold_json(
    title: str,
    results: KfoldResults,
    class_names: Sequence[str],
    facts: Sequence[tuple[str, str]],
    fields: dict[str, Any],
) -> str:
    """Fractions and counts; `fields` are further ones."""
    pooled = results.pooled
    content = {
        "title": title,
        **fields,
        "num_samples": pooled.num_samples,
        "folds": [asdict(figures) for figures in results.folds],
        "mean": results.mean,
        "std": results.std,
        "pooled": {
            "top1": pooled.top1,
            "top1_interval": pooled.top1_interval,
            "top5": pooled.top5,
            "top5_interval": pooled.top5_interval,
        },
        "class_names": list(class_names),
        "per_class": [asdict(row) for row in pooled.table],
        "confusion_matrix": pooled.confusion.tolist(),
        "details": dict(facts),
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
