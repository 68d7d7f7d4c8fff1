"""Decoding by Pillow, for all that libjpeg-turbo does not turn into RGB directly; in bounded memory.

The image is loaded in its own mode, then made RGB tile by tile, on white where there is transparency, and
shrunk on the way where the cap leaves far less of it: beside the pixels as they lie in the file there is
never more than the result.

Example:
    >>> decode_with_pillow(Path("scan.tif").read_bytes(), "TIFF", ImageSettings(), apply_exif=False).shape
    (1000, 750, 3)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from data_prep.manifest import ImageSettings

MAX_PIXELS = 105_000_000  # the largest cameras have 102 million; a worker needs up to 12 bytes for each
# Pillow decodes every WebP as an animation, with several canvases beside the picture.
MAX_WEBP_PIXELS = 52_000_000
TILE_SIDE = 2048
WHITE = (255, 255, 255, 255)

# EXIF orientation → a view of such pixels (height, width, 3) that is upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}
TURNED_BACK = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}


class Rejected(Exception):
    """A file that cannot be used; `str()` is the reason, short and the same for the same fault."""


def decode_with_pillow(
    content: bytes, kind: str, settings: ImageSettings | None, apply_exif: bool
) -> np.ndarray:
    """Bytes of an image file of the given kind → uint8 RGB array of shape (height, width, 3).

    Args:
        settings: where given, an image that is far larger than the cap comes at a fraction of its size, at
            least twice what the cap leaves.

    Raises:
        Rejected: it is broken, too large, or has values that do not say what is black and what white.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at its own limits; the one here is checked before decoding.
            warnings.simplefilter("ignore")
            pixels, orientation = _load(content, kind, settings)
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise _too_large(kind) from None
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad file
        raise Rejected(f"broken {kind}: {reason_of(error)}") from None
    upright = kind == "TIFF"  # Pillow has turned these already
    if apply_exif != upright and orientation != 1:
        pixels = np.ascontiguousarray((UPRIGHT if apply_exif else TURNED_BACK)[orientation](pixels))
    return pixels


def _load(content: bytes, kind: str, settings: ImageSettings | None) -> tuple[np.ndarray, int]:
    """(RGB array as Pillow gives it, EXIF orientation)."""
    with Image.open(io.BytesIO(content), formats=[kind]) as image:
        check_pixels(image.width * image.height, kind)
        _check_depth(image)
        width, height = _smallest_size(image, settings)
        orientation = orientation_of(image)
        if kind == "JPEG":
            image.draft(None, (width, height))  # libjpeg scales by leaving out frequencies
        image.load()
        if kind == "TIFF" and orientation >= 5:
            width, height = height, width
        return _to_rgb(image, width, height), orientation


def check_pixels(num_pixels: int, kind: str) -> None:
    """Rejected: so many pixels would take more memory than a worker may."""
    if num_pixels > (MAX_WEBP_PIXELS if kind == "WEBP" else MAX_PIXELS):
        raise _too_large(kind)


def _too_large(kind: str) -> Rejected:
    return Rejected(f"more than {MAX_WEBP_PIXELS if kind == 'WEBP' else MAX_PIXELS:,} pixels")


def _check_depth(image: Image.Image) -> None:
    # Neither their file nor their values tell which value is white, and a guess by image would make
    # neighbours of different brightness.
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)
    if image.mode == "F" or bits == (12,):
        raise Rejected("float, 12-bit or 32-bit image: save it with 8 or 16 bits")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or where the EXIF block is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken headers raise many kinds; the pixels are what counts
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def _smallest_size(image: Image.Image, settings: ImageSettings | None) -> tuple[int, int]:
    """The least (width, height) that is to come: twice what the cap leaves, but never enlarged."""
    width, height = image.size
    if settings is None or settings.resolution_cap is None:
        return width, height
    capped_height, capped_width = capped_size(height, width, settings.resolution_cap, settings.cap_side)
    return min(width, 2 * capped_width), min(height, 2 * capped_height)


def _to_rgb(image: Image.Image, least_width: int, least_height: int) -> np.ndarray:
    """A loaded image as an RGB array, shrunk by whole factors to no less than the given size."""
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]  # one channel: two numbers
            raise Rejected("float, 12-bit or 32-bit image: save it with 8 or 16 bits")
    width, height = image.size
    factors = max(1, width // least_width), max(1, height // least_height)
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
        # 16-bit grey (older Pillows: a PNG's as "I"). Pillow's own conversion clips at 255; this divides by
        # 257, always: a dark image must stay darker than its neighbour.
        values = np.asarray(tile).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if transparent:
        layer = tile.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer).convert("RGB")
    return tile.convert("RGB")


def capped_size(
    height: int, width: int, cap: int, side: Literal["longest", "shortest"] = "longest"
) -> tuple[int, int]:
    """(height, width) after shrinking, never enlarging, so that the given side is at most `cap` pixels."""
    reference = max(height, width) if side == "longest" else min(height, width)
    if reference <= cap:
        return height, width
    scale = cap / reference
    return max(1, round(height * scale)), max(1, round(width * scale))


def reason_of(error: Exception) -> str:
    """One short line without its numbers, which differ from file to file: equal faults count as one."""
    text = str(error).split("\n")[0].strip() or type(error).__name__
    digits = "".join("N" if character.isdigit() else character for character in text)
    while "NN" in digits:
        digits = digits.replace("NN", "N")
    return digits[:120]
