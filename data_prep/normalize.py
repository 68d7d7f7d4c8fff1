"""Any image file → one baseline RGB JPEG within the resolution cap, or `Rejected` with a reason.

The kind of a file is told by its magic bytes, never by its name. JPEGs are decoded strictly: libjpeg only
warns about zeroed, garbled or missing entropy data and fills in grey, and such an image would be trained on
in silence. EXIF orientation is kept as stored unless `apply_exif` is on. Everything ends as 8-bit RGB,
composed on white where there is transparency. With `encode="lossless"` a baseline JPEG of three components
within the cap keeps its bytes, but is decoded all the same, so that a broken one is found.

Example:
    >>> result = normalize(Path("n02105855_2933.JPEG").read_bytes(), ImageSettings())
    >>> result.width, result.height
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.manifest import ImageSettings
from data_prep.pillow_decode import (
    UPRIGHT,
    Rejected,
    capped_size,
    check_pixels,
    decode_with_pillow,
    orientation_of,
    reason_of,
)

__all__ = ["NormalizedImage", "Rejected", "decode", "image_kind", "normalize"]

MAX_FILE_BYTES = 256 << 20
MAX_KEPT_BYTES = 4 << 20  # of a stored image that keeps its bytes; half a page of a .beton
MAX_SCANS = 200  # of a JPEG; each costs a pass over all pixels (libjpeg-turbo's own advice: 500)
ONE_EIGHTH = {"min_height": 1, "min_width": 1, "min_factor": 8}
# The next marker with a header, as libjpeg finds it: past garbage, stuffed zeros, fill bytes and restarts.
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
RESIZED_BY_CHANNEL = 24 << 20  # bytes of an image
STATISTICS_STRIDE = 4  # mean and std look at every fourth pixel each way: 16 times cheaper, same value

# libjpeg's complaints that leave every pixel as it was meant; others mean lost pixels.
HARMLESS_WARNINGS = ("extraneous bytes before marker", "Unknown Adobe color transform", "JFIF")

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


@dataclass(frozen=True)
class NormalizedImage:
    """A finished JPEG with what index and manifest need.

    Attributes:
        jpeg: baseline JPEG of three components.
        width, height: pixels, both at least 1.
        channel_means: mean of its pixels in [0, 1] and of their squares, three values each; None where they
            were not asked for.
    """

    jpeg: bytes
    width: int
    height: int
    channel_means: tuple[tuple[float, ...], tuple[float, ...]] | None


def normalize(content: bytes, settings: ImageSettings, statistics: bool = True) -> NormalizedImage:
    """Decode, cap and encode one image (or keep its bytes, see the module).

    Args:
        statistics: compute `channel_means`.

    Raises:
        Rejected: the bytes are no image, a damaged one, or too large.
    """
    if settings.encode == "lossless" and (size := _kept_size(content, settings)) is not None:
        # At an eighth of the size only the entropy decoding is left of the work: all that finds faults.
        pixels = _decode_jpeg(content, None, **({} if statistics else ONE_EIGHTH))
        return NormalizedImage(content, *size, channel_means(pixels) if statistics else None)
    pixels = cap_resolution(decode(content, settings), settings.resolution_cap, settings.cap_side)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=settings.quality, colorsubsampling=settings.subsampling)
    height, width = pixels.shape[:2]
    return NormalizedImage(jpeg, width, height, channel_means(pixels) if statistics else None)


def channel_means(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means of values and of squares by channel, from integer histograms: the same on every machine."""
    values = np.arange(256, dtype=np.int64)
    sample = pixels[::STATISTICS_STRIDE, ::STATISTICS_STRIDE]
    means, squares = [], []
    for channel in range(3):
        histogram = np.bincount(sample[..., channel].ravel(), minlength=256)
        total = int(histogram.sum())
        means.append(int(histogram @ values) / (255 * total))
        squares.append(int(histogram @ (values * values)) / (255 * 255 * total))
    return tuple(means), tuple(squares)


def decode(content: bytes, settings: ImageSettings | None = None) -> np.ndarray:
    """Bytes of any supported image file → uint8 RGB array of shape (height, width, 3).

    Args:
        settings: where given, a JPEG that is far larger than the cap may come at a fraction of its size (at
            least twice what the cap leaves), and EXIF orientation is applied if they say so.

    Raises:
        Rejected: as `normalize`.
    """
    if not content:
        raise Rejected("empty file")
    if len(content) > MAX_FILE_BYTES:
        raise Rejected(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
    kind = image_kind(content)
    if kind is None:
        raise Rejected(_what_else(content))
    apply_exif = settings is not None and settings.apply_exif
    if kind != "JPEG":
        return decode_with_pillow(content, kind, settings, apply_exif)
    pixels = _decode_capped(content, settings)
    if apply_exif and (turn := UPRIGHT.get(jpeg_orientation(content))) is not None:
        pixels = np.ascontiguousarray(turn(pixels))
    return pixels


def _what_else(content: bytes) -> str:
    if content[4:8] == b"ftyp":
        return "HEIC or AVIF image, or a video: convert it to JPEG or PNG"
    if content.lstrip()[:1] == b"<":
        return "not an image: HTML, XML or SVG text"
    return "not an image: unknown magic bytes"


def image_kind(content: bytes) -> str | None:
    """The format's name by its magic bytes, or None."""
    for magic, kind in MAGIC:
        if content.startswith(magic):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def _decode_capped(content: bytes, settings: ImageSettings | None) -> np.ndarray:
    """Decode a JPEG, at a fraction of its size where it is several times larger than the cap."""
    if settings is None or settings.resolution_cap is None:
        return _decode_jpeg(content)
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (KeyError, ValueError):
        return _decode_jpeg(content, settings)  # which says what is wrong
    scaled_height, scaled_width = capped_size(height, width, settings.resolution_cap, settings.cap_side)
    if 4 * max(scaled_height, scaled_width) > max(height, width):
        return _decode_jpeg(content, settings)
    # libjpeg scales by leaving out frequencies, which costs a fraction; every bit is still decoded.
    smallest = {"min_height": 2 * scaled_height, "min_width": 2 * scaled_width, "min_factor": 8}
    return _decode_jpeg(content, settings, **smallest)


def _decode_jpeg(content: bytes, settings: ImageSettings | None = None, **scaling: int) -> np.ndarray:
    # Before anything is decoded, by whatever library. Looking at all bytes takes a twentieth of the decoding.
    if not _has_one_scan(content) and _num_scans(content) > MAX_SCANS:
        raise Rejected(f"JPEG with more than {MAX_SCANS} scans")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except KeyError:
        # A chroma subsampling that simplejpeg has no name for.
        return decode_with_pillow(content, "JPEG", settings, apply_exif=False)
    except ValueError as error:
        raise Rejected(f"broken JPEG: {reason_of(error)}") from None
    check_pixels(height * width, "JPEG")
    # Four-component files have no direct way to RGB in libjpeg; they are decoded once to find faults, at an
    # eighth of the size, and once more by Pillow, which knows Adobe's inverted inks. They are 22 in ImageNet.
    four_inks = colorspace in ("CMYK", "YCCK")
    target, scaling = ("CMYK", ONE_EIGHTH) if four_inks else ("RGB", scaling)
    try:
        pixels = simplejpeg.decode_jpeg(content, target, strict=True, **scaling)
    except ValueError as error:
        if not any(warning in str(error) for warning in HARMLESS_WARNINGS):
            raise Rejected(f"broken JPEG: {reason_of(error)}") from None
        if "extraneous" in str(error) and _lost_data(content, str(error)):
            raise Rejected("broken JPEG: zeroed or missing data") from None
        pixels = simplejpeg.decode_jpeg(content, target, strict=False, **scaling)
    return decode_with_pillow(content, "JPEG", settings, apply_exif=False) if four_inks else pixels


def _has_one_scan(content: bytes) -> bool:
    """A baseline frame whose first scan has all components: libjpeg ends after it, whatever follows."""
    num_components, position = 0, 2
    while position + 10 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xC0:
            num_components = content[position + 9]
        elif marker == 0xDA:
            return content[position + 4] == num_components
        elif not (0xDB <= marker <= 0xFE or marker == 0xC4):
            return False  # another kind of frame, or nothing that stands here
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return False


def _num_scans(content: bytes) -> int:
    """Scans that libjpeg would decode, up to the end mark; in segments and after the end none count."""
    num_scans, position = 0, 2
    while (found := MARKER.search(content, position)) is not None and found[1] != b"\xd9":
        num_scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return num_scans


def _lost_data(content: bytes, warning: str) -> bool:
    """Whether bytes that are left over are a sign of damage, and not what careless programs append.

    Zeroed blocks (a failed copy, a hole in a file) are valid codes, shorter than what stood there: the image
    is full before its data ends.
    """
    number = re.search(r"(\d+) extraneous", warning)
    num_left = int(number[1]) if number else 0
    scan = content.find(b"\xff\xda")
    return num_left > max(1024, len(content) // 20) or bytes(32) in content[max(0, scan) :]


def _kept_size(content: bytes, settings: ImageSettings) -> tuple[int, int] | None:
    """(width, height) of a JPEG that every loader reads as it is (baseline, YCbCr, upright, within the cap).

    None for any other file.
    """
    if image_kind(content) != "JPEG" or len(content) > MAX_KEPT_BYTES:
        return None
    marker, precision, num_components = _frame(content)
    if (marker, precision, num_components) != (0xC0, 8, 3):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (KeyError, ValueError):
        return None
    cap = settings.resolution_cap
    if cap is not None and (height, width) != capped_size(height, width, cap, settings.cap_side):
        return None
    if settings.apply_exif and jpeg_orientation(content) in UPRIGHT:
        return None
    return (width, height) if colorspace == "YCbCr" else None


def _frame(content: bytes) -> tuple[int, int, int]:
    """(marker, bits a value, components) of a JPEG's frame header; zeros where there is none."""
    position = 2
    while position + 10 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker, content[position + 4], content[position + 9]
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return 0, 0, 0


def jpeg_orientation(content: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 where there is none, or where the EXIF block is broken."""
    if b"Exif\x00" not in content[: 1 << 17]:
        return 1
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return orientation_of(image)
    except Exception:  # broken headers raise many kinds; the pixels are what counts
        return 1


def cap_resolution(
    pixels: np.ndarray, cap: int | None, side: Literal["longest", "shortest"] = "longest"
) -> np.ndarray:
    """Shrink (never enlarge) so that the longest or the shortest side is at most `cap` pixels."""
    height, width = pixels.shape[:2]
    size = (height, width) if cap is None else capped_size(height, width, cap, side)
    if max(size) > 65535:
        raise Rejected("a side longer than 65,535 pixels")
    if size == (height, width):
        return np.ascontiguousarray(pixels)
    height, width = size
    if pixels.size < RESIZED_BY_CHANNEL:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    # The same values; Pillow's copies and what lies between its two passes take a quarter of the memory.
    resized = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., channel]))
        resized[..., channel] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
    return resized
