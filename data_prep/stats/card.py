"""`data_card.html`: the data card as one page that needs nothing but itself, no network and no script.

Class names and keys come from data sets, so they are untrusted: every text goes through `html.escape`, and
the page's own policy forbids it any request and any script.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from data_prep.page import data_uri, page, section, tiles
from data_prep.stats.contact_sheet import ContactRow, jpeg_bytes
from data_prep.stats.facts import Facts
from data_prep.stats.look import CSS_PIXELS_PER_INCH, PHONE_INCHES, count_text, png_bytes
from data_prep.stats.plots import plot_class_counts, plot_images

STYLE = Path(__file__).with_name("card.css")
STRIP_PIXELS = 175  # height of a contact strip at most, CSS pixels


def render_card(facts: Facts, rows: Sequence[ContactRow], audit_section: str, warnings: Sequence[str]) -> str:
    """The whole page as HTML text. audit_section is HTML, the rest is escaped here.

    warnings: sentences that stand at the top.
    """
    sections = [
        _plot_section(
            "Class balance",
            facts.balance,
            "Images a class",
            plot_class_counts(facts.titles, facts.counts),
            plot_class_counts(facts.titles, facts.counts, width_inches=PHONE_INCHES),
        ),
        _class_table(facts),
        _plot_section(
            "Images",
            "As stored. What lies beyond an axis is counted at its end.",
            "Sizes, aspect ratios and bytes of the images",
            plot_images(facts.indexes),
            plot_images(facts.indexes, width_inches=PHONE_INCHES, columns=1),
        ),
        _contact_section(rows),
        audit_section,
        _facts_section(facts),
    ]
    return page(
        facts.name,
        "Data card",
        _headline(facts, warnings),
        sections,
        "<code>data_card.png</code> beside this page shows the same in one picture.",
        STYLE.read_text(encoding="utf-8"),
    )


def _headline(facts: Facts, warnings: Sequence[str]) -> str:
    lines = "".join(f'<li class="urgent">{html.escape(warning)}</li>' for warning in warnings)
    listing = f'\n<ul class="card findings">{lines}</ul>' if lines else ""
    return f'<p class="lede">{html.escape(facts.lede)}</p>\n{tiles(facts.tiles)}{listing}'


def _plot_section(title: str, note: str, alt: str, wide: Figure, phone: Figure) -> str:
    width, height = (round(inches * CSS_PIXELS_PER_INCH) for inches in wide.get_size_inches())
    source = f'<source media="(max-width: 640px)" srcset="{data_uri(png_bytes(phone), "png")}">'
    image = (
        f'<img width="{width}" height="{height}" alt="{html.escape(alt)}" '
        f'src="{data_uri(png_bytes(wide), "png")}">'
    )
    return section(title, note, f'<div class="card plot"><picture>{source}{image}</picture></div>')


def _class_table(facts: Facts) -> str:
    heads = "".join(f'<th scope="col" class="number">{split}</th>' for split in facts.counts)
    rows = []
    for label, title in enumerate(facts.titles):
        counts = "".join(f'<td class="number">{part[label]:,}</td>' for part in facts.counts.values())
        rows.append(f'<tr><td class="number">{label}</td><td>{html.escape(title)}</td>{counts}</tr>')
    return (
        f'<details class="card"><summary>All {count_text(len(rows), "class", "classes")}</summary>'
        '<div class="table"><table><thead><tr><th scope="col" class="number">Label</th>'
        f'<th scope="col">Class</th>{heads}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>'
        "</div></details>"
    )


def _contact_section(rows: Sequence[ContactRow]) -> str:
    is_single = max((len(row.pictures) for row in rows), default=0) <= 1
    blocks = []
    for row in rows:
        title = f"<h3>{html.escape(row.title)} <span>{count_text(row.num_images, 'image')}</span></h3>"
        strip = _strip(row)
        blocks.append(f"<div>{strip}{title}</div>" if is_single else f"<div>{title}{strip}</div>")
    note = "A seeded choice of classes and images, whole and in their own proportions."
    kind = "classes singles" if is_single else "classes"
    return section("A look inside", note, f'<div class="card {kind}">{"".join(blocks)}</div>')


def _strip(row: ContactRow) -> str:
    """Pictures of equal height that fill the line; in two halves, which a phone puts below each other."""
    aspects = [picture.width / picture.height for picture in row.pictures]
    middle = (len(aspects) + 1) // 2
    halves = []
    for part in (slice(0, middle), slice(middle, None)):
        images = "".join(
            f'<img style="--a:{aspect:.4f}" alt="{html.escape(row.title)}" '
            f'src="{data_uri(jpeg_bytes(picture), "jpeg")}">'
            for picture, aspect in zip(row.pictures[part], aspects[part], strict=True)
        )
        if images:
            halves.append(f'<div class="half" style="--a:{sum(aspects[part]):.4f}">{images}</div>')
    width = STRIP_PIXELS * sum(aspects)
    return f'<div class="strip" style="max-width:{width:.0f}px">{"".join(halves)}</div>'


def _facts_section(facts: Facts) -> str:
    rows = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd></div>"
        for what, value in facts.details
    )
    return section("How it was made", facts.recipe, f'<dl class="card facts">{rows}</dl>')
