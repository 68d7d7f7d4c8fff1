"""The HTML of a comparison: one page that needs nothing but itself.

Names of runs and classes, notes and hardware come from run folders, servers and command lines, so they are
untrusted: every text goes through `html.escape` on its way into the page.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data_prep.page import page, section, tile
from evaluation.compare.columns import TERMS, count_of, rate_text
from evaluation.compare.comparison import Comparison, Pair
from evaluation.compare.figures import ComparedRun
from evaluation.compare.paired import p_value_text, signed
from evaluation.compare.plots import colour_of
from evaluation.compare.stability import RULE
from evaluation.compare.table import best_cells, cell, model_text, shown_columns
from evaluation.plot_image import PlotImage, plot_html
from evaluation.text import count_text, interval_text, percent_text

STYLE = Path(__file__).with_name("page.css")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class PagePlots:
    """None where there is nothing to draw."""

    curves: PlotImage | None
    trade_offs: PlotImage | None
    confusion: PlotImage | None
    differences: PlotImage | None


def render_page(comparison: Comparison, plots: PagePlots, split: str) -> str:
    """The whole page as HTML text."""
    sections = [
        _tests_section(comparison, split),
        _figures_section(comparison),
        _curves_section(plots),
        _trade_offs_section(comparison, plots),
        _confusion_section(comparison, plots),
        _differences_section(comparison, plots),
        _missing_section(comparison),
        _meaning_section(comparison),
    ]
    return page(
        _title(comparison),
        "Comparison",
        _headline(comparison, split),
        sections,
        "<code>compare.json</code> and <code>compare.csv</code> beside this page hold every figure as a "
        "plain number, <code>compare.md</code> the table.",
        STYLE.read_text(encoding="utf-8"),
    )


def _title(comparison: Comparison) -> str:
    number = NUMBERS[len(comparison.runs)].capitalize()
    return f"{number} runs compared"


def _headline(comparison: Comparison, split: str) -> str:
    paragraphs = "".join(f'<p class="lede">{html.escape(text)}</p>\n' for text in _lede(comparison, split))
    notes = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in comparison.notes)
    tiles = _tiles(comparison)
    listing = "\n".join(_run_card(run, comparison) for run in comparison.runs)
    return (
        f"{paragraphs}"
        + (f'<dl class="tiles">{"".join(tiles)}</dl>\n' if tiles else "")
        + f'<ul class="runs">\n{listing}\n</ul>\n{notes}'
    )


def _lede(comparison: Comparison, split: str) -> list[str]:
    best, second = comparison.best, comparison.second
    if best is None or best.score is None:
        return ["No run has an accuracy: there is nothing to choose by."]
    if not comparison.is_paired:
        text = f"{best.name} has the highest top-1 of its own validations: {percent_text(best.score)}"
        if second is not None and second.score is not None:
            text += f", before {second.name} with {percent_text(second.score)}"
        return [text + ". No test on the same images backs this."]
    assert best.predictions is not None
    text = (
        f"{best.name} has the highest top-1: {percent_text(best.score)} of "
        f"{count_text(best.predictions.num_samples, 'image')} ({split})."
    )
    if second is None:
        return [text]
    told = next((pair for pair in comparison.pairs if {pair.run.letter, _letter(comparison.baseline)}
                 == {best.letter, second.letter}), None)  # fmt: skip
    if told is None:
        return [text]
    low, high = told.result.interval
    if told.run.letter == second.letter:  # tested against the best: said the other way round
        low, high = -high, -low
    p_text = p_value_text(told.result.adjusted_p)
    lead = 100 * abs(told.result.difference)
    interval = f"95% interval {signed(100 * low)} to {signed(100 * high)}"
    if told.result.is_told_apart:
        text += (
            f" That is {lead:.1f} points more than {second.name} ({interval}), more than chance ({p_text})."
        )
    else:
        text += (
            f" It cannot be told from {second.name}, {lead:.1f} points behind it ({interval}; {p_text}): "
            "choose between them by cost."
        )
    return [text]


def _letter(run: ComparedRun | None) -> str:
    return "" if run is None else run.letter


def _tiles(comparison: Comparison) -> list[str]:
    tiles = []
    best = comparison.best
    if best is not None and best.score is not None:
        key = "top1" if "top1" in best.figures else "best_top1"
        low, high = best.figures.get(f"{key}_low"), best.figures.get(f"{key}_high")
        interval = f", {interval_text((low, high))}" if low is not None and high is not None else ""
        tiles.append(tile("Highest top-1", percent_text(best.score), f"{best.label}{interval}"))
    for title, key, is_high, words in (
        ("Fastest inference here", "inference_images_per_second", True, "images/s"),
        ("Fewest FLOPs", "forward_flops", False, ""),
        ("Fewest parameters", "num_parameters", False, ""),
    ):
        known = [run for run in comparison.runs if key in run.figures]
        if len(known) > 1:
            first = (max if is_high else min)(known, key=lambda run: run.figures[key])
            value = first.figures[key]
            text = f"{rate_text(value)} {words}" if is_high else count_of(value)
            score = "" if first.score is None else f", top-1 {percent_text(first.score)}"
            tiles.append(tile(title, text, f"{first.label}{score}"))
    return tiles


def _run_card(run: ComparedRun, comparison: Comparison) -> str:
    marks = [
        word for word, other in (("best", comparison.best), ("baseline", comparison.baseline)) if run is other
    ]
    marked = "".join(f' <span class="mark">{mark}</span>' for mark in marks)
    details = [model_text(run), run.record.source]
    if run.record.recipe is not None:
        details.insert(1, f"data {run.record.recipe.data.name}")
    return (
        f'<li class="card">{_badge(run)}<div><b>{html.escape(run.name)}</b>{marked}'
        f"<span>{html.escape(' · '.join(details))}</span></div></li>"
    )


def _badge(run: ComparedRun) -> str:
    return f'<i class="badge" style="background:{colour_of(run)}">{run.letter}</i>'


def _tests_section(comparison: Comparison, split: str) -> str:
    if not comparison.pairs or comparison.baseline is None:
        return ""
    baseline = comparison.baseline
    num_images = comparison.pairs[0].result.num_images
    heads = [("Run", ""), ("Difference", ""), ("95% interval", "wide"), ("Only it right", "wide"),
             (f"Only {baseline.letter} right", "wide"), ("McNemar p", "wide"), ("p, Holm", ""),
             ("Same answer", "wide")]  # fmt: skip
    head = "".join(f'<th scope="col" class="{css}">{html.escape(text)}</th>' for text, css in heads)
    rows = "\n".join(map(_pair_row, comparison.pairs))
    words = "".join(f"<li>{html.escape(pair.words)}.</li>" for pair in comparison.pairs)
    note = (
        f"Each run against {baseline.label} on the same {count_text(num_images, 'image')} ({split}); "
        "differences of top-1 in points of percent."
    )
    if len(comparison.pairs) > 1:
        note += " p in the sentences is after Holm’s correction."
    wrong = comparison.num_wrong_for_all or 0
    share = percent_text(wrong / num_images)
    all_wrong = (
        f"All runs are wrong on {count_text(wrong, 'image')} ({share}): hard ones, or wrongly labelled."
    )
    return section(
        "Tests on the same images",
        note,
        f'<ul class="verdicts">{words}</ul>\n'
        f'<div class="card table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{rows}\n</tbody>\n</table></div>\n<p class="note below">{html.escape(all_wrong)}</p>',
    )


def _pair_row(pair: Pair) -> str:
    result, run = pair.result, pair.run
    low, high = (signed(100 * end) for end in result.interval)
    cells = [
        f'<th scope="row">{_badge(run)} {html.escape(run.name)}</th>',
        f'<td class="number">{signed(100 * result.difference)}</td>',
        f'<td class="number wide">{low} to {high}</td>',
        f'<td class="number wide">{result.num_only_model:,}</td>',
        f'<td class="number wide">{result.num_only_baseline:,}</td>',
        f'<td class="number wide">{p_value_text(result.p_value).removeprefix("p ").removeprefix("= ")}</td>',
        f'<td class="number">{p_value_text(result.adjusted_p).removeprefix("p ").removeprefix("= ")}</td>',
        f'<td class="number wide">{percent_text(result.agreement)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _figures_section(comparison: Comparison) -> str:
    runs = comparison.runs
    head = "".join(
        f'<th scope="col">{_badge(run)} <span class="name">{html.escape(run.name)}</span></th>'
        for run in runs
    )
    groups = []
    for group, columns in groupby(shown_columns(runs), key=lambda column: column.group):
        lines = [
            f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}">{html.escape(group)}</th></tr>'
        ]
        for column in columns:
            best = best_cells(column, runs)
            cells = []
            for run in runs:
                text, note = cell(column, run)
                small = f"<small>{html.escape(note)}</small>" if note else ""
                css = ' class="top"' if run.letter in best else ""
                cells.append(f"<td{css}><span>{html.escape(text)}</span>{small}</td>")
            lines.append(f'<tr><th scope="row">{html.escape(column.title)}</th>{"".join(cells)}</tr>')
        groups.append(f"<tbody>{''.join(lines)}</tbody>")
    note = (
        "The best figure of a line is bold, a dash means that it is not known; every term is explained below."
    )
    if comparison.machine:
        note += f" What was measured here was measured on {comparison.machine}."
    return section(
        "All figures",
        note,
        '<div class="card table figures" tabindex="0" role="region" aria-label="All figures"><table>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n{''.join(groups)}\n</table></div>",
    )


def _curves_section(plots: PagePlots) -> str:
    if plots.curves is None:
        return ""
    return section(
        "Curves",
        "A letter stands at the end of each line. Training losses are running means over the pale rows; with "
        "label smoothing or mixed images they are not comparable with validation losses, nor between recipes "
        "that differ in them.",
        plot_html(plots.curves),
    )


def _trade_offs_section(comparison: Comparison, plots: PagePlots) -> str:
    if plots.trade_offs is None:
        return ""
    what = "on the same images" if comparison.is_paired else "the best of each run’s own validations"
    return section(
        "Accuracy against cost",
        f"Top-1 ({what}). Filled marks, joined by a line, are the Pareto front; a hollow one is beaten by "
        "another run in both.",
        plot_html(plots.trade_offs),
    )


def _confusion_section(comparison: Comparison, plots: PagePlots) -> str:
    if plots.confusion is None or comparison.best is None:
        return ""
    return section(
        "Confusion matrix of the best",
        f"{comparison.best.label}: share of each true class (row) that was predicted as each class (column).",
        plot_html(plots.confusion),
    )


def _differences_section(comparison: Comparison, plots: PagePlots) -> str:
    if plots.differences is None or comparison.best is None or comparison.second is None:
        return ""
    return section(
        "Where the best and the second differ",
        f"The classes in which {comparison.best.label} and {comparison.second.label} differ most. A class "
        "has few images, so single differences may well be chance.",
        plot_html(plots.differences),
    )


def _missing_section(comparison: Comparison) -> str:
    lines = [
        f"<div><dt>{_badge(run)} "
        f"{html.escape(run.name)}</dt><dd>{html.escape(' '.join(run.notes))}</dd></div>"
        for run in comparison.runs
        if run.notes
    ]
    if not lines:
        return ""
    return section("What is missing", "", f'<dl class="card terms">\n{"".join(lines)}\n</dl>')


def _meaning_section(comparison: Comparison) -> str:
    terms = [
        (f"{column.title}", column.meaning) for column in shown_columns(comparison.runs) if column.meaning
    ]
    terms += [("Steady, restless, unstable", RULE), *TERMS]
    lines = "\n".join(
        f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd></div>" for term, meaning in terms
    )
    return section("What the figures mean", "", f'<dl class="card terms">\n{lines}\n</dl>')
