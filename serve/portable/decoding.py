"""Bytes of an image file → 8-bit RGB pixels, as the preparation of the training data makes them.

The kind of a file is told by its magic bytes. CMYK, palette, grey and 16-bit images become 8-bit RGB,
composed on white where there is transparency; of an animation, the first picture counts. EXIF orientation is
ignored unless the training data were turned by it, too. An image larger than the cap of the training data is
shrunk to it.

Pillow decodes JPEGs here, in preparation it is libjpeg-turbo with stricter rules: a file whose data are
damaged in the middle may be refused there and classified here.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from .limits import BadImage, Limits, check_bytes, check_pixels, too_many_pixels

Pixels = NDArray[np.uint8]

MAX_SCANS = 200  # of a JPEG; each costs a pass over all pixels
TILE_SIDE = 2048
WHITE = (255, 255, 255, 255)
ODD_DEPTH = "The image has float, 12-bit or 32-bit values: save it with 8 or 16 bits."
# The next marker with a header, as libjpeg finds it: past garbage, stuffed zeros, fill bytes and restarts.
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"P6", "PPM"),
)
# EXIF orientation → a view of such pixels (height, width, 3) that is upright; and back.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}
TURNED_BACK = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}


def image_kind(content: bytes) -> str | None:
    """The format's name by its magic bytes, or None."""
    for magic, kind in MAGIC:
        if content.startswith(magic):
            return kind
    return "WEBP" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def decode(
    content: bytes,
    limits: Limits,
    *,
    apply_exif: bool = False,
    cap: int | None = None,
    cap_side: str = "longest",
) -> Pixels:
    """uint8 RGB, shape (height, width, 3), with `cap_side` at most `cap` pixels long.

    Raises:
        BadImage: no image, a broken one, or one beyond the limits.
    """
    check_bytes(len(content), limits)
    kind = image_kind(content)
    if kind is None:
        raise BadImage("not_an_image", _what_else(content, limits))
    if kind not in limits.formats:
        raise BadImage("unsupported", f"{kind} is not accepted here: send {', '.join(limits.formats)}.")
    if kind == "JPEG" and _num_scans(content) > MAX_SCANS:
        raise BadImage("broken", f"The JPEG has more than {MAX_SCANS} scans: save it anew.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limits; ours are checked before decoding
            pixels, orientation = _load(content, kind, limits, cap, cap_side)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise too_many_pixels("too many pixels", limits.max_pixels) from None
    except Exception as error:  # decoders raise many kinds on hostile bytes; each is a bad file
        raise BadImage("broken", f"The {kind} is damaged or cut short ({_reason(error)}).") from None
    already_upright = kind == "TIFF"  # Pillow turns these by itself
    if apply_exif != already_upright and orientation != 1:
        pixels = np.ascontiguousarray((UPRIGHT if apply_exif else TURNED_BACK)[orientation](pixels))
    return _capped(pixels, cap, cap_side)


def _load(content: bytes, kind: str, limits: Limits, cap: int | None, side: str) -> tuple[Pixels, int]:
    """(RGB pixels, at least twice as many each way as the cap leaves, EXIF orientation)."""
    with Image.open(io.BytesIO(content), formats=[kind]) as image:
        check_pixels(image.width, image.height, kind, limits)
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)
        if image.mode == "F" or bits == (12,):
            raise BadImage("unsupported", ODD_DEPTH)
        width, height = _smallest_size(image, kind, cap, side)
        orientation = _orientation_of(image)
        if kind == "JPEG":
            image.draft(None, (width, height))  # libjpeg scales by leaving out frequencies
        image.load()
        if kind == "TIFF" and orientation >= 5:
            width, height = height, width
        return _to_rgb(image, width, height), orientation


def _smallest_size(image: Image.Image, kind: str, cap: int | None, side: str) -> tuple[int, int]:
    """The least (width, height) that is to come: twice what the cap leaves, but never enlarged."""
    width, height = image.size
    if cap is None:
        return width, height
    capped_height, capped_width = capped_size(height, width, cap, side)
    if kind == "JPEG" and 4 * max(capped_height, capped_width) > max(height, width):
        return width, height
    return min(width, 2 * capped_width), min(height, 2 * capped_height)


def _to_rgb(image: Image.Image, least_width: int, least_height: int) -> Pixels:
    """A loaded image as RGB, tile by tile, shrunk by whole factors to no less than the given size."""
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]  # one channel: two numbers
            raise BadImage("unsupported", ODD_DEPTH)
    width, height = image.size
    factors = max(1, width // least_width), max(1, height // least_height)
    if image.format == "JPEG" and image.mode != "CMYK":
        factors = 1, 1  # libjpeg has done it
    transparent = image.has_transparency_data
    # A tile of whole cells: the result is that of shrinking the whole image.
    step_x, step_y = (max(1, TILE_SIDE // factor) * factor for factor in factors)
    pixels = np.empty((-(-height // factors[1]), -(-width // factors[0]), 3), np.uint8)
    for top in range(0, height, step_y):
        for left in range(0, width, step_x):
            box = (left, top, min(left + step_x, width), min(top + step_y, height))
            tile = _rgb_tile(image.crop(box), transparent)
            if factors != (1, 1):
                tile = tile.reduce(factors)
            x, y = left // factors[0], top // factors[1]
            pixels[y : y + tile.height, x : x + tile.width] = np.asarray(tile)
    return pixels


def _rgb_tile(tile: Image.Image, transparent: bool) -> Image.Image:
    if tile.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips at 255; this divides by 257.
        values = np.asarray(tile).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if transparent:
        layer = tile.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer).convert("RGB")
    return tile.convert("RGB")


def _capped(pixels: Pixels, cap: int | None, side: str) -> Pixels:
    height, width = pixels.shape[:2]
    size = (height, width) if cap is None else capped_size(height, width, cap, side)
    if size == (height, width):
        return np.ascontiguousarray(pixels)
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def capped_size(height: int, width: int, cap: int, side: str = "longest") -> tuple[int, int]:
    """(height, width) after shrinking, never enlarging, so that the given side is at most `cap` pixels."""
    reference = max(height, width) if side == "longest" else min(height, width)
    if reference <= cap:
        return height, width
    scale = cap / reference
    return max(1, round(height * scale)), max(1, round(width * scale))


def _orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or where the EXIF block is broken."""
    try:
        value: Any = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken headers raise many kinds; the pixels are what counts
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def _num_scans(content: bytes) -> int:
    """Scans that libjpeg would decode, up to the end mark."""
    num_scans, position = 0, 2
    while (found := MARKER.search(content, position)) is not None and found[1] != b"\xd9":
        num_scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return num_scans


def _what_else(content: bytes, limits: Limits) -> str:
    if content[4:8] == b"ftyp":
        return "This is HEIC, AVIF or a video: convert it to JPEG or PNG."
    if content.lstrip()[:1] == b"<":
        return "This is HTML, XML or SVG text, not an image: send JPEG, PNG or another format of pixels."
    return f"This is not an image: send {', '.join(limits.formats)}."


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0].strip() or type(error).__name__
    # Pillow names the buffer it was given by its address.
    return re.sub(r"<_io\.BytesIO[^>]*>", "the file", text)[:120]
