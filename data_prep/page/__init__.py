"""The pages that commands leave behind: one look, one frame, pieces of HTML that all of them need.

A page needs nothing but itself: styles, script and images are inside, and its own policy forbids it any
request. Names of classes, files and runs come from data sets and command lines, so they are untrusted:
arguments named `title`, `eyebrow`, `heading`, `note`, `label`, `figure` or `text` are text and escaped here;
those named `body`, `headline` and `footer` are HTML, escaped by whoever made them.

Example:
    >>> tiles = f'<dl class="tiles headline">{tile("Images", "5,400")}</dl>'
    >>> html = page("intel", "Data card", tiles, [section("Images", "As stored.", "<p>…</p>")], "", "")
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'$policy">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">$eyebrow</p>
<h1>$title</h1>
$headline
</header>
$sections
<footer>$footer</footer>
</main>
$script</body>
</html>
""")  # noqa: E501


def page(
    title: str,
    eyebrow: str,
    headline: str,
    bodies: Sequence[str],
    footer: str,
    style: str = "",
    *,
    is_sortable: bool = False,
) -> str:
    """A whole page; empty `bodies` are left out.

    Args:
        style: a style sheet of its own, after that of all pages.
        is_sortable: whether it has tables whose heads are buttons, to be sorted by (see `tables.css`).
    """
    styles = ["base.css", *["tables.css"] * is_sortable]
    return FRAME.substitute(
        title=html.escape(title),
        eyebrow=html.escape(eyebrow),
        headline=headline,
        sections="\n".join(body for body in bodies if body),
        footer=footer,
        style="".join(map(_read, styles)) + style,
        policy="; script-src 'unsafe-inline'" if is_sortable else "",
        script=f"<script>\n{_read('sort.js')}</script>\n" if is_sortable else "",
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def section(heading: str, note: str, body: str) -> str:
    """A heading, a sentence or two, and what they are about."""
    small = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{small}{body}\n</section>"


def tile(label: str, figure: str, note: str = "") -> str:
    """A figure in large, within `<dl class="tiles">`."""
    small = f'<dd class="note">{html.escape(note)}</dd>' if note else ""
    label, figure = html.escape(label), html.escape(figure)
    return f'<div class="tile"><dt>{label}</dt><dd class="figure">{figure}</dd>{small}</div>'


def tiles(items: Sequence[tuple[str, str, str]], is_headline: bool = False) -> str:
    """Figures in large, (label, figure, note) each."""
    cells = "".join(tile(*item) for item in items)
    return f'<dl class="tiles{" headline" if is_headline else ""}">{cells}</dl>'


def paragraph(text: str, css_class: str = "") -> str:
    return f'<p class="{css_class}">{html.escape(text)}</p>'


def table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, object]]], label: str) -> str:
    """A sortable table of (text, value to sort by) cells.

    A column whose head begins with * is left out on phones.
    """
    classes = ["wide" if head.startswith("*") else "" for head in heads]
    head = "".join(
        f'<th scope="col" class="{css}" aria-sort="none"><button type="button">'
        f"{html.escape(name.removeprefix('*'))}</button></th>"
        for name, css in zip(heads, classes, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{css}{" number" if isinstance(value, int | float) else ""}" '
            f'data-value="{html.escape(str(value))}">{html.escape(text)}</td>'
            for (text, value), css in zip(row, classes, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="card table" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def details(items: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, both text, to look up."""
    rows = "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in items
    )
    return f'<dl class="card details">\n{rows}\n</dl>'


def data_uri(content: bytes, kind: str) -> str:
    """An image (`png`, `jpeg`) as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
