"""The page of a label audit. Class names and keys come from data sets, so each is escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.page import data_uri, details, page, paragraph, section, table, tiles
from data_prep.stats.contact_sheet import jpeg_bytes
from evaluation.audit.sheet import SuspectImage
from evaluation.audit.suspects import Accuracy, BeforeAndAfter, SecondOpinion
from evaluation.plot_image import PICTURE_GRID
from evaluation.text import count_text, interval_text, percent_text

MAX_PAIRS = 30
STYLE = """
.grid.suspects { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.grid.suspects img { border: 0; }
.grid.suspects b { color: var(--wrong); }
.grid.suspects .sure { color: var(--wrong); }
.grid.suspects .truth { color: var(--ink); }
@media (max-width: 640px) { .grid.suspects { grid-template-columns: 1fr 1fr; } }
"""
CONSTRUCTION_NOTE = (
    "The model is wrong on every suspect, or it would be none. So its accuracy without them is higher by "
    "construction: as many of its other errors, left out at random, would give the same figure. It is no "
    "measure of how many labels are wrong: that takes a person."
)


@dataclass(frozen=True, eq=False)
class AuditContent:
    """What the page shows."""

    title: str
    class_names: Sequence[str]
    num_samples: int
    num_suspects: int
    estimated_wrong_fraction: float
    figures: BeforeAndAfter
    second: SecondOpinion | None
    pair_counts: NDArray[np.int64]
    images: Sequence[SuspectImage]
    facts: Sequence[tuple[str, str]]
    method: str


def audit_page(content: AuditContent) -> str:
    """The whole page, self-contained."""
    share = content.num_suspects / content.num_samples
    lede = (
        f"{count_text(content.num_suspects, 'label')} of {content.num_samples:,} "
        f"{'is' if content.num_suspects == 1 else 'are'} contradicted with confidence by a model that never "
        "saw the image. A suspect is a reason to look, not a verdict: hard images are among them."
    )
    headline = [
        ("Suspects", f"{content.num_suspects:,}", f"{percent_text(share)} of the labels"),
        ("Estimated wrong labels", percent_text(content.estimated_wrong_fraction), "the model's estimate"),
        (
            "Top-1 on all images",
            _top1(content.figures.all_images),
            _interval(content.figures.all_images),
        ),
    ]
    return page(
        content.title,
        "Label audit",
        paragraph(lede, "lede") + tiles(headline, is_headline=True),
        [
            _images_section(content),
            _pairs_section(content),
            _accuracy_section(content),
            _second_section(content.second),
            section("Details", "", details(content.facts)),
        ],
        html.escape(f"Method: {content.method}.")
        + " suspects.csv and audit.json beside this page hold the ranked list.",
        PICTURE_GRID.read_text(encoding="utf-8") + STYLE,
        is_sortable=True,
    )


def _images_section(content: AuditContent) -> str:
    if not content.images:
        return section("Suspects", "There is none.", "")
    note = (
        f"The first {len(content.images)}, most suspicious first: the label as given, then what the model "
        "says, its number in suspects.csv, and the probability of the given label."
    )
    cards = "\n".join(map(_card, content.images))
    return section("Suspects", note, f'<div class="grid suspects">\n{cards}\n</div>')


def _card(item: SuspectImage) -> str:
    given, suggested = html.escape(item.given_name), html.escape(item.suggested_name)
    source = data_uri(jpeg_bytes(item.picture), "jpeg")
    same = " · same image elsewhere" if item.suspect.duplicates else ""
    key = html.escape(item.suspect.key)
    return (
        f'<figure><img alt="An image labelled {given}" title="{key}" src="{source}">'
        f'<figcaption><span class="truth">{given}</span><b>→ {suggested}</b>'
        f"<span>#{item.suspect.rank} · {percent_text(item.suspect.score)}{same}</span></figcaption></figure>"
    )


def _pairs_section(content: AuditContent) -> str:
    pairs = np.argwhere(content.pair_counts)
    if not len(pairs):
        return ""
    counts = content.pair_counts[pairs[:, 0], pairs[:, 1]]
    order = np.argsort(-counts, kind="stable")[:MAX_PAIRS]
    names = content.class_names
    rows: list[list[tuple[str, object]]] = [
        [(names[given], names[given]), (names[true], names[true]), (f"{count:,}", int(count))]
        for (given, true), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]
    note = "Which label was given, and what the model says instead: how many suspects each."
    return section("Pairs", note, table(["Given", "Suggested", "Suspects"], rows, "Pairs of labels"))


def _accuracy_section(content: AuditContent) -> str:
    figures = content.figures
    rows = [
        _accuracy_row("All images", figures.all_images),
        _accuracy_row("Without the suspects", figures.without_suspects),
    ]
    heads = ["Top-1 of the audit's model", "Images", "Top-1", "*95% interval"]
    return section("Accuracy before and after", CONSTRUCTION_NOTE, table(heads, rows, "Accuracy"))


def _second_section(second: SecondOpinion | None) -> str:
    if second is None:
        return ""
    note = (
        "A model trained apart, which had no part in choosing the suspects. A suspect that it does not share "
        "is likely the first model's own error. One that it does share need not be a wrong label: models of "
        "the same training images share most errors that they are confident of, on hard images too."
    )
    rows = [
        _accuracy_row("Right on all images", second.all_images),
        _accuracy_row("Right on images that are no suspects", second.kept),
        _accuracy_row("Right on the suspects, as labelled", second.suspects),
        _accuracy_row("Names the suggested class, of the suspects", second.agrees_on_suspects),
        _accuracy_row("Makes the same error, of the other errors", second.agrees_on_other_errors),
    ]
    heads = ["Second model", "Images", "Share", "*95% interval"]
    return section("A second opinion", note, table(heads, rows, "A second opinion"))


def _accuracy_row(name: str, accuracy: Accuracy) -> list[tuple[str, object]]:
    return [
        (name, name),
        (f"{accuracy.num_samples:,}", accuracy.num_samples),
        (_top1(accuracy), "" if accuracy.top1 is None else accuracy.top1),
        (_interval(accuracy, ""), "" if accuracy.interval is None else accuracy.interval[0]),
    ]


def _top1(accuracy: Accuracy) -> str:
    return "–" if accuracy.top1 is None else percent_text(accuracy.top1)


def _interval(accuracy: Accuracy, words: str = "95% interval ") -> str:
    return "–" if accuracy.interval is None else words + interval_text(accuracy.interval)
