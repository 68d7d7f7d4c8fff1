"""Accuracy under corruptions: a table that is a heat map, and one image under each of them."""

import html
from collections.abc import Sequence

from evaluation.metrics import distinct_names
from evaluation.report.section import Section, thumbnail_uri
from evaluation.robustness.corruptions import CORRUPTIONS
from evaluation.robustness.measure import CorruptedExample, CorruptionAccuracy, RobustnessResult
from evaluation.text import count_text, interval_text, percent_text

HEADING = "Robustness to corruptions"


def build_robustness(
    result: RobustnessResult, examples: Sequence[CorruptedExample], class_names: Sequence[str]
) -> Section:
    """The section of a measured result; `examples` as `corrupted_examples` gives them."""
    metrics = {"robustness_clean_top1": result.clean_top1, "robustness_mean_top1": result.mean_top1}
    if result.relative is not None:
        metrics["robustness_relative"] = result.relative
    return Section(
        HEADING,
        _note(result),
        f"{_table(result)}\n{_strip(examples, distinct_names(class_names))}",
        figures={"robustness": result.as_fields()},
        metrics=metrics,
    )


def _note(result: RobustnessResult) -> str:
    images = count_text(result.num_images, "image")
    if result.num_images < result.num_in_split:
        images += f" (a sample of the {result.num_in_split:,}, drawn by class, seed {result.seed})"
    severities = _listing([str(severity) for severity in result.severities])
    word = "severity" if len(result.severities) == 1 else "severities"
    kinds = sorted(result.kinds, key=result.kind_mean)
    note = (
        f"Of {images}, {percent_text(result.clean_top1)} are right as they are, and "
        f"{percent_text(result.mean_top1)} on average under {count_text(len(kinds), 'corruption')} "
        f"at {word} {severities}"
    )
    note += "." if result.relative is None else f": {percent_text(result.relative)} of the clean accuracy."
    if len(kinds) > 1:
        note += f" {_words(kinds[0])} is the weakest point, with {percent_text(result.kind_mean(kinds[0]))}"
        groups = result.group_means()
        if len(groups) > 1:
            weakest = min(groups, key=groups.__getitem__)
            note += f" (of the groups, {weakest}: {percent_text(groups[weakest])})"
        least = f"{_words(kinds[-1], starts=False)} costs least"
        note += f"; {least}, with {percent_text(result.kind_mean(kinds[-1]))}."
    return note


def _table(result: RobustnessResult) -> str:
    num_columns = len(result.severities) + 2
    head = "".join(
        f'<th scope="col"><span class="wide">Severity </span>{severity}</th>'
        for severity in result.severities
    )
    clean = (
        f'<tr><th scope="row">None (clean)</th><td class="number" colspan="{num_columns - 1}">'
        f"{percent_text(result.clean_top1)}<span>{interval_text(result.clean_top1_interval, 0)}</span>"
        "</td></tr>"
    )
    bodies = [f"<tbody>{clean}</tbody>"]
    for group, mean in result.group_means().items():
        rows = [
            f'<tr><th scope="rowgroup" colspan="{num_columns - 1}">{group.capitalize()}</th>'
            f'<td class="number group">{percent_text(mean)}</td></tr>'
        ]
        rows += [_row(kind, result) for kind in result.kinds if CORRUPTIONS[kind].group == group]
        bodies.append("<tbody>\n" + "\n".join(rows) + "\n</tbody>")
    explanation = (
        f"Top-1 at {result.resolution} pixels by severity, 1 the mildest; under each figure its "
        "95% interval. The deeper the colour, "
        "the larger the share of the clean accuracy that is lost. The corruptions are ImageNet-C-style, made "
        "on the fly at this resolution: figures are not comparable with published mCE."
    )
    return (
        f'<div class="card table heat" tabindex="0" role="region" aria-label="{HEADING}"><table>\n'
        f'<caption class="note">{html.escape(explanation)}</caption>\n'
        f'<thead><tr><th scope="col">Corruption</th>{head}<th scope="col">Mean</th></tr></thead>\n'
        + "\n".join(bodies)
        + "\n</table></div>"
    )


def _row(kind: str, result: RobustnessResult) -> str:
    cells = [_cell(cell, result.clean_top1) for cell in result.cells if cell.kind == kind]
    mean = result.kind_mean(kind)
    return (
        f'<tr><th scope="row">{html.escape(CORRUPTIONS[kind].name)}</th>{"".join(cells)}'
        f'<td class="number lost"{_lost(mean, result.clean_top1)}>{percent_text(mean)}</td></tr>'
    )


def _cell(cell: CorruptionAccuracy, clean_top1: float) -> str:
    return (
        f'<td class="number lost"{_lost(cell.top1, clean_top1)}>{percent_text(cell.top1)}'
        f"<span>{interval_text(cell.top1_interval, 0)}</span></td>"
    )


def _lost(top1: float, clean_top1: float) -> str:
    """The share of right answers that is gone, 0 to 1, for the style sheet."""
    lost = min(max(1 - top1 / clean_top1, 0), 1) if clean_top1 else 0
    return f' style="--lost:{lost:.3f}"'


def _strip(examples: Sequence[CorruptedExample], names: Sequence[str]) -> str:
    if not examples:
        return ""
    severity = max(example.severity for example in examples)
    true = html.escape(names[examples[0].label])
    cards = "\n".join(_card(example, names) for example in examples)
    return (
        f'<p class="note strip-note">One image of {true} under each corruption at severity {severity}, '
        f'with the model’s answer.</p>\n<div class="grid strip">\n{cards}\n</div>'
    )


def _card(example: CorruptedExample, names: Sequence[str]) -> str:
    verdict, symbol = ("right", "✓") if example.predicted_label == example.label else ("wrong", "✗")
    kind = html.escape(CORRUPTIONS[example.kind].name if example.kind else "Clean")
    return (
        f'<figure class="{verdict}"><img alt="{kind}" src="{thumbnail_uri(example.image)}"><figcaption>'
        f"<b>{symbol} {html.escape(names[example.predicted_label])}</b><span>{kind}</span>"
        "</figcaption></figure>"
    )


def _words(kind: str, starts: bool = True) -> str:
    """The kind in a sentence, or at its start: "Motion blur", "motion blur", "Gaussian noise", "JPEG"."""
    name = CORRUPTIONS[kind].name
    is_proper = kind in ("gaussian_noise", "jpeg")
    name = name if starts or is_proper else name.lower()
    return f"{name} blur" if CORRUPTIONS[kind].group == "blur" else name


def _listing(words: Sequence[str]) -> str:
    """ "1, 3 and 5"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
