"""`data_card.png`: the whole data card in one picture, for a README or a tracking server.

Panels on a canvas 1200 CSS pixels wide: what it is, its figures, the class balance, the images' sizes, and
the contact sheet; with an audit, what that found.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from data_prep.stats.contact_sheet import ContactRow, justified
from data_prep.stats.facts import Facts
from data_prep.stats.look import (
    BLUE,
    CARD,
    CSS_PIXELS_PER_INCH,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAGE,
    PIXEL_DENSITY,
    font,
    one_line,
    picture_of,
)
from data_prep.stats.plots import plot_class_counts, plot_images

WIDTH = 1200  # CSS pixels
DENSITY = 1.5
MARGIN = 40
GAP = 16
PADDING = 18
PANEL_INCHES = (WIDTH - 2 * MARGIN - 2 * PADDING) / CSS_PIXELS_PER_INCH


def overview_png(facts: Facts, rows: Sequence[ContactRow], findings: Sequence[str] | None) -> bytes:
    """The picture as PNG. findings: the audit's sentences, None where there was no audit."""
    canvas = _Canvas()
    canvas.text("DATA CARD", 13, BLUE, bold=True)
    canvas.text(facts.name, 36, INK, bold=True, below=10)
    canvas.text(facts.lede, 16, INK, below=18)
    canvas.tiles(facts.tiles)
    if findings is not None:
        canvas.panel("Audit", canvas.sentences(findings))
    canvas.panel(
        "Class balance", _shrunk(plot_class_counts(facts.titles, facts.counts, width_inches=PANEL_INCHES))
    )
    canvas.panel("Images", _shrunk(plot_images(facts.indexes, width_inches=PANEL_INCHES, columns=4)))
    canvas.panel("A look inside", _contact_picture(rows))
    canvas.text(facts.recipe, 13, MUTED, below=0)
    return canvas.png()


def _shrunk(figure: Figure) -> Image.Image:
    picture = picture_of(figure)
    scale = DENSITY / PIXEL_DENSITY
    return picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )


def _px(css_pixels: float) -> int:
    return round(css_pixels * DENSITY)


def _contact_picture(rows: Sequence[ContactRow]) -> Image.Image:
    """Classes in two columns, each a title above a strip of its pictures; or single pictures in six."""
    width = WIDTH - 2 * MARGIN - 2 * PADDING
    is_single = max((len(row.pictures) for row in rows), default=0) <= 1
    num_columns = min(6 if is_single else 2, max(len(rows), 1))
    gap = 18 if is_single else 28
    block = (width - gap * (num_columns - 1)) // num_columns
    blocks = [_contact_block(row, block, 118 if is_single else 96) for row in rows]
    lines = [blocks[start : start + num_columns] for start in range(0, len(blocks), num_columns)]
    heights = [max(picture.height for picture in line) for line in lines]
    sheet = Image.new("RGB", (_px(width), sum(heights) + _px(14) * max(len(lines) - 1, 0)), CARD)
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for column, picture in enumerate(line):
            sheet.paste(picture, (_px(column * (block + gap)), top))
        top += height + _px(14)
    return sheet


def _contact_block(row: ContactRow, width: int, max_height: int) -> Image.Image:
    strip = justified(row.pictures, _px(width), _px(max_height), _px(4))
    picture = Image.new("RGB", (_px(width), strip.height + _px(22)), CARD)
    title_font = font(13, DENSITY, bold=True)
    ImageDraw.Draw(picture).text(
        (0, 0), _fitted(row.title, title_font, _px(width)), fill=INK, font=title_font
    )
    picture.paste(strip, (0, _px(22)))
    return picture


def _fitted(text: str, typeface: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened until it is not wider than `width` pixels."""
    shown = one_line(text, 300)
    while len(shown) > 2 and typeface.getlength(shown) > width:
        shown = one_line(text, len(shown) - 1)
    return shown


def _wrapped(text: str, typeface: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in one_line(text, 600).split(" "):
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and typeface.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_fitted(word, typeface, width))
    return lines


class _Canvas:
    """Grows downwards; sizes in CSS pixels."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, Image.Image]] = []  # left, top, picture; pixels
        self._top = _px(MARGIN)

    def _add(self, picture: Image.Image, below: float) -> None:
        self._parts.append((_px(MARGIN), self._top, picture))
        self._top += picture.height + _px(below)

    def text(self, text: str, size: float, colour: str, bold: bool = False, below: float = 4) -> None:
        self._add(_text_picture(text, size, colour, bold, WIDTH - 2 * MARGIN, PAGE), below)

    def tiles(self, tiles: Sequence[tuple[str, str, str]]) -> None:
        """Tiles of (what, figure, note) side by side."""
        width = (WIDTH - 2 * MARGIN - GAP * (len(tiles) - 1)) / len(tiles)
        line = Image.new("RGB", (_px(WIDTH - 2 * MARGIN), _px(98)), PAGE)
        draw = ImageDraw.Draw(line)
        for number, (what, figure, note) in enumerate(tiles):
            left = number * (width + GAP)
            box = (_px(left), 0, _px(left + width) - 1, line.height - 1)
            draw.rounded_rectangle(box, _px(12), fill=CARD, outline=LINE, width=_px(1))
            for text, size, colour, y, bold in (
                (what, 12.5, MUTED, 14, False),
                (figure, 23, INK, 33, True),
                (note, 12, MUTED, 68, False),
            ):
                typeface = font(size, DENSITY, bold)
                shown = _fitted(text, typeface, _px(width - 32)) if text else ""
                draw.text((_px(left + 16), _px(y)), shown, fill=colour, font=typeface)
        self._add(line, GAP)

    def sentences(self, sentences: Sequence[str]) -> Image.Image:
        width = WIDTH - 2 * MARGIN - 2 * PADDING
        lines = [
            _text_picture(f"• {text}", 15, ORANGE if "also in train" in text else INK, False, width, CARD)
            for text in sentences
        ]
        picture = Image.new("RGB", (_px(width), sum(line.height for line in lines)), CARD)
        top = 0
        for line in lines:
            picture.paste(line, (0, top))
            top += line.height
        return picture

    def panel(self, title: str, content: Image.Image) -> None:
        """A white card with a title over its content."""
        height = _px(PADDING + 30) + content.height + _px(PADDING)
        card = Image.new("RGB", (_px(WIDTH - 2 * MARGIN), height), PAGE)
        draw = ImageDraw.Draw(card)
        box = (0, 0, card.width - 1, height - 1)
        draw.rounded_rectangle(box, _px(12), fill=CARD, outline=LINE, width=_px(1))
        draw.text((_px(PADDING), _px(PADDING - 4)), title, fill=INK, font=font(17, DENSITY, bold=True))
        card.paste(content, (_px(PADDING), _px(PADDING + 30)))
        self._add(card, GAP)

    def png(self) -> bytes:
        canvas = Image.new("RGB", (_px(WIDTH), self._top + _px(MARGIN - GAP / 2)), PAGE)
        for left, top, picture in self._parts:
            canvas.paste(picture, (left, top))
        buffer = io.BytesIO()
        canvas.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def _text_picture(text: str, size: float, colour: str, bold: bool, width: int, paper: str) -> Image.Image:
    typeface = font(size, DENSITY, bold)
    lines = _wrapped(text, typeface, _px(width))
    step = math.ceil(size * 1.4 * DENSITY)
    picture = Image.new("RGB", (_px(width), step * len(lines)), paper)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, fill=colour, font=typeface)
    return picture
