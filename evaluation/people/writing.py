"""Write a comparison with people: page, figures as PNG, numbers as JSON.

Files are written under a temporary name and renamed, the page last: a reader never sees half of one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import utf8_bytes, write_file
from evaluation.people.analysis import Measured, OrderCheck, Question
from evaluation.people.matching import groups_of
from evaluation.people.measuring import Results
from evaluation.people.page import PeopleContent, render_page, ridge_r2
from evaluation.people.plots import plot_dimensions, plot_layers, plot_similarities, plot_spaces
from evaluation.plot_image import PlotImage, draw_plot
from evaluation.predict import TrainedModel
from train.validation import views_of

RSA, DISPARITY, HELD_OUT = "Similarity, Spearman’s ρ", "Disparity (lower is closer)", "r outside the fit"


def write_comparison(
    out: Path,
    options: argparse.Namespace,
    trained: TrainedModel,
    folder: Path,
    question: Question,
    results: Results,
    rules: Sequence[str],
    checks: Sequence[OrderCheck],
    pairs: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Write people.html, people.json and the figures into `out`; the headline's figures, named for MLflow."""
    pictures = _pictures(question, results, pairs)
    details = _details(options, trained, folder)
    compared = question.compared
    content = PeopleContent(
        title=f"{trained.recipe.model.name} on {folder.name}",
        split=options.split,
        num_layers=len(results.layers),
        trained=results.chosen,
        untrained=results.untrained_chosen,
        pixels=results.pixels,
        rules=rules,
        checks=checks,
        compared_with=compared[2] if compared else "",
        measure={"euclidean": "Euclidean distance"}.get(question.measure, question.measure),
        spaces=pictures.get("spaces"),
        dimensions=pictures.get("dimensions"),
        similarities=pictures.get("similarities"),
        layers=pictures.get("layers"),
        details=details,
    )
    figures = headline_figures(results)
    fields: dict[str, Any] = {
        "title": content.title,
        "layer": results.chosen.name,
        "headline": figures,
        "rows": list(rules),
        "order_checks": [asdict(check) for check in checks],
        "human_similarities": content.compared_with or None,
        "model_similarity": question.measure,
        "num_permutations": question.num_permutations,
        "layers": [_as_json(one) for one in results.layers],
        "untrained": [[_as_json(one) for one in layers] for layers in results.untrained],
        "pixels": [_as_json(one) for one in results.pixels],
        "noise_ceiling": None,
        "details": details,
    }
    page = render_page(content)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("spaces", "dimensions", "similarities", "layers"):
        picture = pictures.get(name)
        if picture is None:
            (out / f"{name}.png").unlink(
                missing_ok=True
            )  # of an earlier comparison: it would pass for this one's
        else:
            write_file(out / f"{name}.png", picture.wide_png)
    text = json.dumps(fields, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(out / "people.json", utf8_bytes(text))
    write_file(out / "people.html", utf8_bytes(page))
    return figures


def headline_figures(results: Results) -> dict[str, float]:
    """The chosen layer's main figures, under the names they have in MLflow."""
    figures: dict[str, float] = {}
    if (found := results.chosen.similarity) is not None:
        figures["people_similarity_spearman"] = found.spearman
    if (fit := results.chosen.space) is not None:
        figures["people_disparity"] = fit.disparity
        figures["people_mean_correlation"] = fit.mean_correlation
        figures["people_held_out_correlation"] = fit.held_out_mean_correlation
        if (r2 := ridge_r2(fit)) is not None:
            figures["people_ridge_r2"] = r2
    return figures


def _as_json(measured: Measured) -> dict[str, Any]:
    """A measured layer without its points and matrices."""
    space = None if measured.space is None else asdict(measured.space)
    if space is not None:
        del space["human"], space["model"]
    similarity = None if measured.similarity is None else asdict(measured.similarity)
    return {"name": measured.name, "space": space, "similarity": similarity}


def _pictures(question: Question, results: Results, pairs: Sequence[tuple[int, int]]) -> dict[str, PlotImage]:
    pictures: dict[str, PlotImage] = {}
    chosen, compared = results.chosen, question.compared
    if (fit := chosen.space) is not None and question.coordinates is not None:
        names, rows = _marked_points(question)
        if pairs:
            pictures["spaces"] = draw_plot(
                "Points of people and of the network after the fit, two dimensions at a time",
                lambda width: plot_spaces(fit, pairs, names, rows, width_inches=width),
            )
        pictures["dimensions"] = draw_plot(
            "Correlations and R² of each human dimension",
            lambda width: plot_dimensions(fit, width_inches=width),
        )
    if compared is not None and chosen.similarities is not None:
        values, matching, _ = compared
        shown = [short_class_name(name, question.class_names) for name in matching.names]
        ours = chosen.similarities
        pictures["similarities"] = draw_plot(
            "Similarities of all pairs by people and by the network",
            lambda width: plot_similarities(values, ours, shown, width_inches=width),
        )
    if len(results.layers) > 1:
        panels, levels = _layer_panels(results)
        layer_names = [one.name for one in results.layers]
        pictures["layers"] = draw_plot(
            "Measures of each layer, from the first to the last",
            lambda width: plot_layers(layer_names, panels, levels, width_inches=width),
        )
    return pictures


def _marked_points(question: Question) -> tuple[list[str], list[list[int]]]:
    """Names and rows of the points to mark: class means where rows are samples, else all rows."""
    assert question.coordinates is not None
    matching = question.coordinates.matching
    if matching.kind == "classes":
        names = [short_class_name(name, question.class_names) for name in matching.names]
        return names, [[row] for row in range(len(names))]
    labels = question.labels[matching.targets]
    present = np.unique(labels).tolist()
    names = [short_class_name(question.class_names[label], question.class_names) for label in present]
    return names, [np.flatnonzero(labels == label).tolist() for label in present]


def short_class_name(name: str, class_names: Sequence[str]) -> str:
    """`Andesite` for `I_Andesite` where all names begin with a group and stay different without it."""
    if not groups_of(class_names) or len({one.split("_", 1)[1] for one in class_names}) < len(class_names):
        return name
    return name.split("_", 1)[-1]


def _layer_panels(results: Results) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Curves over the layers, and levels of the pixels alone, a panel each."""
    readers: dict[str, Callable[[Measured], float | None]] = {
        RSA: lambda one: None if one.similarity is None else one.similarity.spearman,
        HELD_OUT: lambda one: None if one.space is None else one.space.held_out_mean_correlation,
        DISPARITY: lambda one: None if one.space is None else one.space.disparity,
    }
    panels: dict[str, dict[str, list[float]]] = {}
    levels: dict[str, dict[str, float]] = {}
    for title, read in readers.items():
        values = [value for one in results.layers if (value := read(one)) is not None]
        if len(values) < len(results.layers):
            continue
        panels[title] = {"trained": values}
        if results.untrained:
            random = [[read(one) for one in layers] for layers in results.untrained]
            panels[title]["random weights"] = np.array(random, dtype=float).mean(0).tolist()
        levels[title] = {one.name: value for one in results.pixels if (value := read(one)) is not None}
    return panels, levels


def _details(options: argparse.Namespace, trained: TrainedModel, folder: Path) -> dict[str, str]:
    recipe = trained.recipe
    resolution = options.resolution or recipe.validation_resolution
    human = [str(path) for path in (options.coordinates, options.similarities, options.distances) if path]
    return {
        "checkpoint": str(options.checkpoint),
        "epoch": str(trained.progress["epoch"]),
        "model": f"{recipe.model.library} {recipe.model.name}",
        "weights": "the run's average (EMA)" if views_of(recipe)[0].weights == "ema" else "of the last step",
        "weights at the start": recipe.weights_at_start,
        "data set": f"{folder} ({options.split})",
        "human data": ", ".join(human),
        "images": f"{resolution} px, centre crop {recipe.validation.crop_ratio:g}, not mirrored, fp32",
        "maps and tokens": "their mean" if options.pool == "mean" else "all in a row",
        "permutations": f"{options.permutations:,} a test, seed {options.seed}",
    }
