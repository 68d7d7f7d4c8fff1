"""What is accepted as an image, and the one sentence for what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fault = Literal["empty", "too_large", "too_many_pixels", "not_an_image", "unsupported", "broken"]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


class BadImage(ValueError):
    """Bytes that cannot be classified; `str()` is one sentence for whoever sent them.

    Attributes:
        fault: what kind of fault it is, for programs.
    """

    def __init__(self, fault: Fault, sentence: str) -> None:
        super().__init__(sentence)
        self.fault: Fault = fault


@dataclass(frozen=True)
class Limits:
    """The largest image that is looked at.

    Attributes:
        max_bytes: of the file.
        max_pixels: width × height, told by the header before anything is decoded; decoding takes up to 12
            bytes a pixel. Of a WebP, half as many: it is decoded with several canvases beside the picture.
        formats: accepted ones, told by magic bytes and never by a name.
    """

    max_bytes: int = 256 << 20
    max_pixels: int = 105_000_000
    formats: tuple[str, ...] = FORMATS


def check_bytes(num_bytes: int, limits: Limits) -> None:
    """BadImage where a file of so many bytes is not looked at."""
    if num_bytes == 0:
        raise BadImage("empty", "The file is empty.")
    if num_bytes > limits.max_bytes:
        raise BadImage(
            "too_large", f"The file is larger than {_megabytes(limits.max_bytes)}: make it smaller."
        )


def check_pixels(width: int, height: int, kind: str, limits: Limits) -> None:
    """BadImage where an image of this size is not decoded."""
    allowed = limits.max_pixels // 2 if kind == "WEBP" else limits.max_pixels
    if width * height > allowed:
        raise too_many_pixels(f"{width} × {height} pixels", allowed)


def too_many_pixels(what: str, allowed: int) -> BadImage:
    return BadImage(
        "too_many_pixels",
        f"The image has {what}, and more than {allowed:,} are not decoded: make it smaller.",
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes:,} bytes"
