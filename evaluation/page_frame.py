"""A page in the look of the report: its style sheet and its sortable tables, with other contents.

All arguments named `text` are escaped here; those named `body` are HTML already.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = Path(__file__).parent / "report" / "template.html"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}{own_style}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">{eyebrow}</p>
<h1>{title}</h1>
{headline}
</header>
{sections}
<footer>{footer}</footer>
</main>
<script>{script}</script>
</body>
</html>
"""  # noqa: E501


def page(title: str, eyebrow: str, headline_body: str, bodies: Sequence[str], footer: str, style: str) -> str:
    """A whole page; `title`, `eyebrow` and `footer` are text, `style` is a style sheet of its own."""
    template = TEMPLATE.read_text(encoding="utf-8")
    shared_style, script = (
        re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0] for tag in ("style", "script")
    )
    return PAGE.format(
        title=html.escape(title),
        eyebrow=html.escape(eyebrow),
        headline=headline_body,
        sections="\n".join(body for body in bodies if body),
        footer=html.escape(footer),
        style=shared_style,
        own_style=style,
        script=script,
    )


def section(heading: str, note: str, body: str) -> str:
    """A heading and a note, both text, and HTML below."""
    paragraph = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{paragraph}{body}\n</section>"


def paragraph(text: str, css_class: str = "") -> str:
    return f'<p class="{css_class}">{html.escape(text)}</p>'


def tiles(items: Sequence[tuple[str, str, str]], is_headline: bool = False) -> str:
    """Figures, (label, figure, note) each."""
    cells = []
    for label, figure, note in items:
        label, figure = html.escape(label), html.escape(figure)
        small = f'<dd class="note">{html.escape(note)}</dd>' if note else ""
        cells.append(f'<div class="tile"><dt>{label}</dt><dd class="figure">{figure}</dd>{small}</div>')
    return f'<dl class="tiles{" headline" if is_headline else ""}">{"".join(cells)}</dl>'


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
    """A table of names and values, to look up."""
    rows = "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in items
    )
    return f'<dl class="card details">\n{rows}\n</dl>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
