"""Names of files and classes, which may be anybody's, as a terminal or a table can have them."""

from __future__ import annotations

# A spreadsheet takes a cell that begins so for a formula, and may run it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def as_cell(text: str) -> str:
    """The text as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def encodable(name: str) -> str:
    r"""A file's name as text; bytes of it that are no UTF-8 become `\udcff` and the like, spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """The text on one line, with nothing that moves a terminal's cursor or changes its colours."""
    return "".join(char if char.isprintable() else "?" for char in text)
