"""The HTML of a comparison with people: one page that needs nothing but itself.

Names of classes, layers and files are untrusted: every text goes through `html.escape`, and the page's own
policy forbids it any request.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from evaluation.people.analysis import Measured, OrderCheck
from evaluation.people.layers import PENULTIMATE
from evaluation.people.procrustes import SpaceFit
from evaluation.people.similarity import SimilarityFit
from evaluation.plot_style import PIXEL_DENSITY
from evaluation.text import percent_text

TEMPLATE = Path(__file__).with_name("page_template.html")


@dataclass(frozen=True)
class Picture:
    """A figure as PNG, for a desktop and for a phone."""

    alt: str
    wide_png: bytes
    phone_png: bytes


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
    spaces: Picture | None
    dimensions: Picture | None
    similarities: Picture | None
    layers: Picture | None
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
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(content.title),
        headline=_headline(content),
        sections="\n".join(section for section in sections if section),
        footer="<code>people.json</code> beside this page holds every figure. Procrustes analysis: Gower "
        "(1975). Representational similarity: Kriegeskorte, Mur and Bandettini (2008).",
    )


def layer_words(name: str) -> str:
    """A layer as a sentence names it."""
    return "the next-to-last layer" if name == PENULTIMATE else f"layer {name}"


def _headline(content: PeopleContent) -> str:
    trained, tiles = content.trained, []
    sentences = []
    if (found := trained.similarity) is not None:
        others = "; ".join(
            f"{words} {value:.2f}"
            for words, value in [
                (
                    "random weights",
                    _mean([one.similarity.spearman for one in content.untrained if one.similarity]),
                ),
                *[(one.name, one.similarity.spearman) for one in content.pixels if one.similarity],
            ]
            if value is not None
        )
        sentences.append(
            f"What {layer_words(trained.name)} finds alike, people find alike with a rank correlation of "
            f"{found.spearman:.2f}" + (f" ({others})" if others else "")
        )
        note = (
            ""
            if found.interval is None
            else f"95% interval {found.interval[0]:.2f} to {found.interval[1]:.2f}, "
        )
        tiles.append(
            _tile(
                "Similarity, Spearman’s ρ", f"{found.spearman:.2f}", f"{note}{_p_text(found.permutation_p)}"
            )
        )
    if (space := trained.space) is not None:
        sentences.append(
            f"Turned and scaled onto the {space.num_dimensions} human dimensions, its points correlate with "
            f"them at {space.held_out_mean_correlation:.2f} outside the fit, {space.mean_correlation:.2f} "
            "inside"
        )
        tiles.append(
            _tile(
                "Correlation outside the fit",
                f"{space.held_out_mean_correlation:.2f}",
                f"mean of {space.num_dimensions} dimensions; {space.mean_correlation:.2f} inside the fit",
            )
        )
        tiles.append(
            _tile(
                "Procrustes disparity",
                f"{space.disparity:.2f}",
                f"rows shuffled: {space.permuted_disparity:.2f}, {_p_text(space.permutation_p)}",
            )
        )
        if space.ridge is not None:
            new = space.ridge.new_classes or space.ridge.new_rows
            words = "of new classes" if space.ridge.new_classes else "of new rows"
            note = (
                f"of new images: {_signed(space.ridge.new_rows.mean_r2)}" if space.ridge.new_classes else ""
            )
            tiles.append(_tile(f"Ridge regression, R² {words}", _signed(new.mean_r2), note))
    lede = ". ".join(sentences)
    return f'<p class="lede">{html.escape(lede)}.</p>\n<dl class="tiles headline">{"".join(tiles)}</dl>'


def _comparison_section(content: PeopleContent) -> str:
    rows = [_comparison_row(content.title, [content.trained], "trained")]
    if content.untrained:
        rows.append(
            _comparison_row(f"random weights, mean of {len(content.untrained)} networks", content.untrained)
        )
    rows += [_comparison_row(one.name, [one]) for one in content.pixels]
    has_space, has_similarity = content.trained.space is not None, content.trained.similarity is not None
    heads = ["Features"]
    heads += ["Similarity ρ"] if has_similarity else []
    heads += ["r outside the fit", "r inside", "Disparity", "Ridge R²"] if has_space else []
    head = "".join(
        f'<th scope="col" class="{"number" if place else ""}">{name}</th>' for place, name in enumerate(heads)
    )
    note = (
        f"The same figures for {layer_words(content.trained.name)} of the trained network, for that of the "
        "same architecture with random weights, and for the pixels alone. What those reach, training has "
        "not brought."
    )
    if len(content.untrained) > 1:
        note += " In brackets: lowest and highest."
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
    table = f'<div class="card table"><table>\n{body}\n</table></div>'
    return _section("Against what needs no training", note, table)


def _comparison_row(name: str, measured: Sequence[Measured], style: str = "") -> str:
    cells = [f"<td>{html.escape(name)}</td>"]
    similarities = [one.similarity for one in measured if one.similarity is not None]
    spaces = [one.space for one in measured if one.space is not None]
    if similarities:
        cells.append(_range_cell([one.spearman for one in similarities]))
    if spaces:
        cells.append(_range_cell([one.held_out_mean_correlation for one in spaces]))
        cells.append(_range_cell([one.mean_correlation for one in spaces]))
        cells.append(_range_cell([one.disparity for one in spaces]))
        cells.append(_range_cell([r2 for one in spaces if (r2 := ridge_r2(one)) is not None]))
    return f'<tr class="{style}">{"".join(cells)}</tr>'


def ridge_r2(fit: SpaceFit) -> float | None:
    """Mean R² of the harder question that could be asked: new classes, or else new rows."""
    if fit.ridge is None:
        return None
    return (fit.ridge.new_classes or fit.ridge.new_rows).mean_r2


def _range_cell(values: Sequence[float]) -> str:
    mean = _mean(values)
    text = "–" if mean is None else _signed(mean)
    if len(values) > 1:
        text += f" ({_signed(min(values))} to {_signed(max(values))})"
    return f'<td class="number">{html.escape(text)}</td>'


def _spaces_section(content: PeopleContent) -> str:
    fit = content.trained.space
    if fit is None or content.spaces is None or content.dimensions is None:
        return ""
    within = ""
    if fit.within_group_p is not None:
        within = (
            f" Shuffled inside each class only: {_p_text(fit.within_group_p)}; a small p says that "
            "differences between images of one class agree, too."
        )
    note = (
        f"{fit.num_rows:,} points. The network's {fit.num_features:,} features are reduced to "
        f"{fit.num_dimensions} principal components ({percent_text(fit.explained_variance)} of their "
        "variance), then shifted, turned, mirrored and scaled by one factor onto the human space. r is "
        "Pearson's correlation in the fit. With rows shuffled the fit leaves a disparity of "
        f"{fit.permuted_disparity:.2f} instead of {fit.disparity:.2f}, {_p_text(fit.permutation_p)}.{within}"
    )
    below = (
        "Lines: 95% interval over classes, the fit held fixed. Outside the fit: fitted on one half of the "
        "classes, judged on the other, 20 random halves. Ridge regression reads each dimension from all "
        "features, its penalty chosen inside each training part; 0 is no better than the mean, and values "
        "below −0.5 are drawn at that edge."
    )
    return _section("Both spaces", note, _plot(content.spaces)) + _section(
        "Dimension by dimension", below, _plot(content.dimensions)
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
    return _section("What is alike", note, _plot(content.similarities) + _group_tiles(found))


def _group_tiles(found: SimilarityFit) -> str:
    if not found.within_groups:
        return ""
    tiles = [
        _tile(f"Pairs inside {name}", _signed(value), "Spearman’s ρ")
        for name, value in found.within_groups.items()
    ]
    if found.between_groups is not None:
        tiles.append(_tile("Pairs of different groups", _signed(found.between_groups), "Spearman’s ρ"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _layers_section(content: PeopleContent) -> str:
    if content.layers is None:
        return ""
    note = (
        f"{content.num_layers} layers from the input (top) to the output. To name the best of them is to "
        "choose on the data that it is judged by: its figure is too high for a new set of judgments."
    )
    return _section("Layer by layer", note, _plot(content.layers))


def _order_section(content: PeopleContent) -> str:
    lines = [*content.rules, *[check.sentence for check in content.checks]]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    faults = "".join(
        f'<p class="fault">{html.escape(check.fault)}</p>' for check in content.checks if check.fault
    )
    return _section("Which row is which image", "", f'<ul class="read">{items}</ul>{faults}')


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
    return _section("What these figures do not say", "", f'<ul class="read">{items}</ul>')


def _details_section(content: PeopleContent) -> str:
    rows = "\n".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
        for key, value in content.details.items()
    )
    return _section("Details", "", f'<dl class="card details">\n{rows}\n</dl>')


def _section(heading: str, note: str, body: str) -> str:
    paragraph = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{paragraph}{body}\n</section>"


def _plot(picture: Picture) -> str:
    # A PNG states its size at the bytes 16 to 24; with it the page does not jump while it loads.
    width, height = (int.from_bytes(picture.wide_png[i : i + 4], "big") // PIXEL_DENSITY for i in (16, 20))
    phone = f'<source media="(max-width: 640px)" srcset="{_data_uri(picture.phone_png)}">'
    size = f'width="{width}" height="{height}"'
    image = f'<img {size} alt="{html.escape(picture.alt)}" src="{_data_uri(picture.wide_png)}">'
    return f'<div class="card plot"><picture>{phone}{image}</picture></div>'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _tile(label: str, figure: str, note: str = "") -> str:
    small = f'<dd class="note">{html.escape(note)}</dd>' if note else ""
    shown = f'<dd class="figure">{html.escape(figure)}</dd>'
    return f'<div class="tile"><dt>{html.escape(label)}</dt>{shown}{small}</div>'


def _p_text(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0015 else f"p = {p:.1g}"


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
