"""The HTML of a comparison with people: one page that needs nothing but itself.

Names of classes, layers and files are untrusted: every text goes through `html.escape`, and the page's own
policy forbids it any request.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.page import details, page, section, tile
from evaluation.people.analysis import Measured, OrderCheck
from evaluation.people.html_parts import mean_of, p_text, range_cell, signed
from evaluation.people.layers import PENULTIMATE
from evaluation.people.procrustes import SpaceFit
from evaluation.people.similarity import SimilarityFit
from evaluation.plot_image import PlotImage, plot_html
from evaluation.text import percent_text

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class PeopleContent:
    """What the page shows; pictures that there was nothing to draw for are None.

    Attributes:
        trained: of the chosen layer. untrained: the same layer of networks with random weights, one a seed.
        pixels: of the image alone (mean colour, thumbnails).
        rules: how rows were matched. checks: what speaks for that order.
        compared_with: where the human similarities come from. measure: of the network's similarities.
    """

    title: str
    split: str
    num_layers: int
    trained: Measured
    untrained: Sequence[Measured]
    pixels: Sequence[Measured]
    rules: Sequence[str]
    checks: Sequence[OrderCheck]
    compared_with: str
    measure: str
    spaces: PlotImage | None
    dimensions: PlotImage | None
    similarities: PlotImage | None
    layers: PlotImage | None
    details: Mapping[str, str]


def render_page(content: PeopleContent) -> str:
    """The whole page as HTML text."""
    sections = [
        _comparison_section(content),
        _spaces_section(content),
        _similarity_section(content),
        _layers_section(content),
        _order_section(content),
        _limits_section(content),
        _details_section(content),
    ]
    return page(
        content.title,
        "Representation against people",
        _headline(content),
        sections,
        "<code>people.json</code> beside this page holds every figure. Procrustes analysis: Gower "
        "(1975). Representational similarity: Kriegeskorte, Mur and Bandettini (2008).",
        STYLE.read_text(encoding="utf-8"),
    )


def layer_words(name: str) -> str:
    """A layer as a sentence names it."""
    return "the next-to-last layer" if name == PENULTIMATE else f"layer {name}"


def _headline(content: PeopleContent) -> str:
    sentences, tiles = [], []
    if (found := content.trained.similarity) is not None:
        sentences.append(_similarity_sentence(content, found))
        low, high = found.interval or (None, None)
        note = "" if low is None or high is None else f"95% interval {signed(low)} to {signed(high)}, "
        tiles.append(
            tile("Similarity, Spearman’s ρ", signed(found.spearman), note + p_text(found.permutation_p))
        )
    if (fit := content.trained.space) is not None:
        inside, outside = signed(fit.mean_correlation), signed(fit.held_out_mean_correlation)
        sentences.append(
            f"Turned and scaled onto the {fit.num_dimensions} human dimensions, its points correlate with "
            f"them at {outside} outside the fit, {inside} inside"
        )
        note = f"mean of {fit.num_dimensions} dimensions; {inside} inside the fit"
        tiles.append(tile("Correlation outside the fit", outside, note))
        note = f"rows shuffled: {signed(fit.permuted_disparity)}, {p_text(fit.permutation_p)}"
        tiles.append(tile("Procrustes disparity", signed(fit.disparity), note))
        tiles += _ridge_tiles(fit)
    lede = html.escape(". ".join(sentences))
    return f'<p class="lede">{lede}.</p>\n<dl class="tiles headline">{"".join(tiles)}</dl>'


def _similarity_sentence(content: PeopleContent, found: SimilarityFit) -> str:
    others = [f"{one.name} {signed(one.similarity.spearman)}" for one in content.pixels if one.similarity]
    random = mean_of([one.similarity.spearman for one in content.untrained if one.similarity])
    others[:0] = [] if random is None else [f"random weights {signed(random)}"]
    return (
        f"What {layer_words(content.trained.name)} finds alike, people find alike with a rank correlation of "
        f"{signed(found.spearman)}" + (f" ({'; '.join(others)})" if others else "")
    )


def _ridge_tiles(fit: SpaceFit) -> list[str]:
    if fit.ridge is None:
        return []
    rows = signed(fit.ridge.new_rows.mean_r2)
    if fit.ridge.new_classes is None:
        return [tile("Ridge regression, R² of new rows", rows)]
    classes = signed(fit.ridge.new_classes.mean_r2)
    return [tile("Ridge regression, R² of new classes", classes, f"of new images: {rows}")]


def _comparison_section(content: PeopleContent) -> str:
    rows = [_comparison_row(content.title, [content.trained], "trained")]
    if content.untrained:
        rows.append(_comparison_row("random weights", content.untrained))
    rows += [_comparison_row(one.name, [one]) for one in content.pixels]
    has_space, has_similarity = content.trained.space is not None, content.trained.similarity is not None
    heads = ["Features"]
    heads += ["Similarity ρ"] if has_similarity else []
    heads += ["r outside the fit", "Ridge R²", "Disparity", "r inside the fit"] if has_space else []
    head = "".join(
        f'<th scope="col" class="{"number" if place else ""}">{name}</th>' for place, name in enumerate(heads)
    )
    note = (
        f"The same figures for {layer_words(content.trained.name)} of the trained network, for that of the "
        "same architecture with random weights, and for the pixels alone. What those reach, training has "
        "not brought."
    )
    if len(content.untrained) > 1:
        note += (
            f" Random weights: the mean of {len(content.untrained)} networks, below it lowest and highest."
        )
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
    table = f'<div class="card table"><table>\n{body}\n</table></div>'
    return section("Against what needs no training", note, table)


def _comparison_row(name: str, measured: Sequence[Measured], style: str = "") -> str:
    cells = [f"<td>{html.escape(name)}</td>"]
    similarities = [one.similarity for one in measured if one.similarity is not None]
    spaces = [one.space for one in measured if one.space is not None]
    if similarities:
        cells.append(range_cell([one.spearman for one in similarities]))
    if spaces:
        cells.append(range_cell([one.held_out_mean_correlation for one in spaces]))
        cells.append(range_cell([r2 for one in spaces if (r2 := ridge_r2(one)) is not None]))
        cells.append(range_cell([one.disparity for one in spaces]))
        cells.append(range_cell([one.mean_correlation for one in spaces]))
    return f'<tr class="{style}">{"".join(cells)}</tr>'


def ridge_r2(fit: SpaceFit) -> float | None:
    """Mean R² of the harder question that could be asked: new classes, or else new rows."""
    if fit.ridge is None:
        return None
    return (fit.ridge.new_classes or fit.ridge.new_rows).mean_r2


def _spaces_section(content: PeopleContent) -> str:
    fit = content.trained.space
    if fit is None or content.spaces is None or content.dimensions is None:
        return ""
    within = ""
    if fit.within_group_p is not None:
        within = (
            f" Shuffled inside each class only: {p_text(fit.within_group_p)}; a small p says that "
            "differences between images of one class agree, too."
        )
    note = (
        f"{fit.num_rows:,} points. The network's {fit.num_features:,} features are reduced to "
        f"{fit.num_dimensions} principal components ({percent_text(fit.explained_variance)} of their "
        "variance), then shifted, turned, mirrored and scaled by one factor onto the human space. r is "
        "Pearson's correlation in the fit. With rows shuffled the fit leaves a disparity of "
        f"{fit.permuted_disparity:.2f} instead of {fit.disparity:.2f}, {p_text(fit.permutation_p)}.{within}"
    )
    below = (
        "Lines: 95% interval over classes, the fit held fixed. Outside the fit: fitted on one half of the "
        "classes, judged on the other, 20 random halves. Ridge regression reads each dimension from all "
        "features, its penalty chosen inside each training part; 0 is no better than the mean, and values "
        "below −0.5 are drawn at that edge."
    )
    return section("Both spaces", note, plot_html(content.spaces)) + section(
        "Dimension by dimension", below, plot_html(content.dimensions)
    )


def _similarity_section(content: PeopleContent) -> str:
    found = content.trained.similarity
    if found is None or content.similarities is None:
        return ""
    note = (
        f"{found.num_pairs:,} pairs of {found.num_rows:,} rows, people's from {content.compared_with}, the "
        f"network's by {content.measure}. Colours are ranks among all pairs, dark is alike; the diagonal is "
        "not compared."
    )
    return section("What is alike", note, plot_html(content.similarities) + _group_tiles(found))


def _group_tiles(found: SimilarityFit) -> str:
    if not found.within_groups:
        return ""
    tiles = [
        tile(f"Pairs inside {name}", signed(value), "Spearman’s ρ")
        for name, value in found.within_groups.items()
    ]
    if found.between_groups is not None:
        tiles.append(tile("Pairs of different groups", signed(found.between_groups), "Spearman’s ρ"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _layers_section(content: PeopleContent) -> str:
    if content.layers is None:
        return ""
    note = (
        f"{content.num_layers} layers from the input (top) to the output. To name the best of them is to "
        "choose on the data that it is judged by: its figure is too high for a new set of judgments."
    )
    return section("Layer by layer", note, plot_html(content.layers))


def _order_section(content: PeopleContent) -> str:
    lines = [*content.rules, *[check.sentence for check in content.checks]]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    faults = "".join(
        f'<p class="fault">{html.escape(check.fault)}</p>' for check in content.checks if check.fault
    )
    return section("Which row is which image", "", f'<ul class="read">{items}</ul>{faults}')


def _limits_section(content: PeopleContent) -> str:
    lines = [
        "How well people agree with each other is not in these files, so the highest figure that any model "
        "could reach (the noise ceiling) is unknown.",
        "A figure inside a fit grows with the number of dimensions and shrinks with the number of rows; "
        "compare networks by those outside the fit.",
    ]
    if content.split == "train":
        lines.append(
            "The network was trained on these very images: it has been told their classes. Figures on "
            "images that it has not seen may be lower."
        )
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return section("What these figures do not say", "", f'<ul class="read">{items}</ul>')


def _details_section(content: PeopleContent) -> str:
    return section("Details", "", details(list(content.details.items())))
