"""Pieces of the page in HTML. What comes from files, models or people is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from serve.page.classifying import Row


def percent(probability: float) -> str:
    """`93.1%`; what is not quite nothing or everything is not said to be."""
    if probability < 0.001:
        return "< 0.1%"
    return "> 99.9%" if 0.9995 <= probability < 1 else f"{100 * probability:.1f}%"


def header(title: str, sentence: str) -> str:
    return f'<header class="top"><h1>{escape(title)}</h1><p>{escape(sentence)}</p></header>'


def bars(names: Sequence[str], probabilities: Sequence[float]) -> str:
    """The most probable classes as a list with bars."""
    items = "".join(
        f'<li><span class="name">{escape(name)}</span><span class="share">{percent(value)}</span>'
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * value:.2f}%"></span></span></li>'
        for name, value in zip(names, probabilities, strict=True)
    )
    return f'<ol class="bars" aria-label="Most probable classes">{items}</ol>'


def hint(sentence: str) -> str:
    return f'<p class="hint">{escape(sentence)}</p>'


def problem(sentence: str) -> str:
    return f'<p class="problem" role="alert">{escape(sentence)}</p>'


def table(rows: Sequence[Row]) -> str:
    """A line a file: thumbnail, name, class with its confidence, the next one; or what is wrong with it."""
    failed = sum(bool(row.problem) for row in rows)
    counted = f"{len(rows)} {'file' if len(rows) == 1 else 'files'}"
    said = f"{counted}, {failed} of them could not be used" if failed else f"{counted}"
    lines = "".join(_problem_line(row) if row.problem else _line(row) for row in rows)
    return (
        f'<p class="count">{said}</p><div class="many"><table><thead><tr><th></th><th>File</th><th>Class</th>'
        f'<th class="next">Next</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _line(row: Row) -> str:
    share = row.probabilities[0]
    following = (
        f"{escape(row.names[1])} <small>{percent(row.probabilities[1])}</small>" if len(row.names) > 1 else ""
    )
    return (
        f'<tr><td class="thumb"><img src="{row.thumbnail}" alt=""></td>'
        f'<td class="file">{escape(row.file)}</td>'
        f'<td class="class"><b>{escape(row.names[0])}</b> <small>{percent(share)}</small>'
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * share:.2f}%"></span></span></td>'
        f'<td class="next">{following}</td></tr>'
    )


def _problem_line(row: Row) -> str:
    return (
        f'<tr class="failed"><td class="thumb"><span aria-hidden="true">!</span></td>'
        f'<td class="file">{escape(row.file)}</td><td colspan="2" class="why">{escape(row.problem)}</td></tr>'
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'
