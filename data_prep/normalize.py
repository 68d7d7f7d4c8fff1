"""Any image file → one baseline RGB JPEG within the resolution cap, or `Rejected` with a reason.

The kind of a file is told by its magic bytes, never by its name. JPEGs are decoded strictly: libjpeg only
warns about zeroed, garbled or missing entropy data and fills in grey, and such an image would be trained on
in silence. EXIF orientation is kept as stored. Everything ends as 8-bit RGB, composed on white where there
is transparency.

Example:
    >>> result = normalize(Path("n02105855_2933.JPEG").read_bytes(), ImageSettings())
    >>> result.width, result.height
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.manifest import ImageSettings

MAX_PIXELS = 200_000_000  # a decompression bomb, or nothing that a classifier needs
MAX_FILE_BYTES = 256 << 20
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
)


class Rejected(Exception):
    """A file that cannot be used; `str()` is the reason, short and the same for the same fault."""


@dataclass(frozen=True)
class NormalizedImage:
    """A finished JPEG with what index and manifest need.

    Attributes:
        jpeg: baseline RGB JPEG, 4:2:0.
        width, height: pixels, both at least 1.
        channel_mean, channel_square_mean: of its pixels in [0, 1], three values each.
    """

    jpeg: bytes
    width: int
    height: int
    channel_mean: tuple[float, float, float]
    channel_square_mean: tuple[float, float, float]


def normalize(content: bytes, settings: ImageSettings) -> NormalizedImage:
    """Decode, cap and encode one image.

    Raises:
        Rejected: the bytes are no image, a damaged one, or too large.
    """
    pixels = cap_resolution(decode(content), settings.resolution_cap)
    # The statistics are those of the stored pixels, in float64: the sums run over a million images.
    sample = pixels[::STATISTICS_STRIDE, ::STATISTICS_STRIDE].reshape(-1, 3).astype(np.float64) / 255
    mean, square_mean = sample.mean(0), (sample**2).mean(0)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=settings.quality, colorsubsampling="420")
    height, width = pixels.shape[:2]
    return NormalizedImage(jpeg, width, height, tuple(mean.tolist()), tuple(square_mean.tolist()))


def decode(content: bytes) -> np.ndarray:
    """Bytes of any supported image file → uint8 RGB array of shape (height, width, 3).

    Raises:
        Rejected: as `normalize`.
    """
    if not content:
        raise Rejected("empty file")
    if len(content) > MAX_FILE_BYTES:
        raise Rejected(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
    kind = image_kind(content)
    if kind is None:
        raise Rejected("not an image: unknown magic bytes")
    if kind == "JPEG":
        return _decode_jpeg(content)
    return _decode_other(content, kind)


def image_kind(content: bytes) -> str | None:
    """The format's name by its magic bytes, or None."""
    for magic, kind in MAGIC:
        if content.startswith(magic):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def _decode_jpeg(content: bytes) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except KeyError:
        return _decode_other(content, "JPEG")  # a chroma subsampling that simplejpeg has no name for
    except ValueError as error:
        raise Rejected(f"broken JPEG: {_reason(error)}") from None
    if height * width > MAX_PIXELS:
        raise Rejected(f"more than {MAX_PIXELS:,} pixels")
    # Four-component files have no direct way to RGB in libjpeg; they are decoded once to find faults, and
    # once more by Pillow, which knows Adobe's inverted inks. They are 22 in ImageNet.
    four_inks = colorspace in ("CMYK", "YCCK")
    target = "CMYK" if four_inks else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(content, colorspace=target, strict=True)
    except ValueError as error:
        if not any(warning in str(error) for warning in HARMLESS_WARNINGS):
            raise Rejected(f"broken JPEG: {_reason(error)}") from None
        pixels = simplejpeg.decode_jpeg(content, colorspace=target, strict=False)
    return _decode_other(content, "JPEG") if four_inks else pixels


def _decode_other(content: bytes, kind: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of what it refuses; the limit here is our own, checked before decoding.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=[kind]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Rejected(f"more than {MAX_PIXELS:,} pixels")
                image.load()
                return np.asarray(_to_rgb(image))
    except Rejected:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad file
        raise Rejected(f"broken {kind}: {_reason(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return image.convert("RGB")


def cap_resolution(pixels: np.ndarray, cap: int | None) -> np.ndarray:
    """Shrink (never enlarge) so that the longest side is at most `cap` pixels."""
    height, width = pixels.shape[:2]
    if cap is None or max(height, width) <= cap:
        if max(height, width) > 65535:
            raise Rejected("a side longer than 65,535 pixels")
        return np.ascontiguousarray(pixels)
    scale = cap / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _reason(error: Exception) -> str:
    """One short line without its numbers, which differ from file to file: equal faults count as one."""
    text = str(error).split("\n")[0].strip() or type(error).__name__
    digits = "".join("N" if character.isdigit() else character for character in text)
    while "NN" in digits:
        digits = digits.replace("NN", "N")
    return digits[:120]
