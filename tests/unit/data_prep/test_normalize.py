"""Strange files: each is either made into an honest RGB JPEG, or rejected with a reason."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from data_prep.manifest import ImageSettings
from data_prep.normalize import Rejected, cap_resolution, decode, normalize
from data_prep.pillow_decode import MAX_PIXELS, MAX_WEBP_PIXELS
from tests.conftest import ROOT, class_image

SETTINGS = ImageSettings()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    return class_image(1, 7, 120, 80)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_kind_is_told_by_magic_bytes(picture: Image.Image, kind: str) -> None:
    result = normalize(encoded(picture, kind), SETTINGS)
    assert (result.width, result.height) == (120, 80)
    pixels = simplejpeg.decode_jpeg(result.jpeg, strict=True)
    difference = np.abs(pixels.astype(int) - np.asarray(picture)).mean()
    assert difference < (30 if kind == "GIF" else 12)  # GIF keeps 256 colours, chroma is halved


def test_result_is_baseline_rgb_jpeg(picture: Image.Image) -> None:
    jpeg = normalize(encoded(picture, "JPEG", progressive=True), SETTINGS).jpeg
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "I;16"])
def test_colour_modes_become_rgb(picture: Image.Image, mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey)
    else:
        image = picture.convert(mode)
    pixels = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (80, 120, 3)
    expected = np.asarray(picture if mode in ("CMYK", "P") else picture.convert("L").convert("RGB"))
    if mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    else:
        assert np.abs(pixels.astype(int) - expected).mean() < 20


def test_transparency_is_put_on_white() -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode(encoded(image, "PNG")) == 255).all()


def test_exif_orientation_is_kept_as_stored(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    result = normalize(encoded(picture, "JPEG", exif=exif), SETTINGS)
    assert (result.width, result.height) == (120, 80)


def test_resolution_cap_shrinks_the_longest_side_and_never_enlarges() -> None:
    wide = normalize(encoded(class_image(0, 1, 900, 300), "JPEG"), SETTINGS)
    assert (wide.width, wide.height) == (500, 167)
    small = normalize(encoded(class_image(0, 1, 30, 20), "JPEG"), SETTINGS)
    assert (small.width, small.height) == (30, 20)


def test_extreme_sizes() -> None:
    thin = normalize(encoded(Image.new("RGB", (2000, 1)), "PNG"), SETTINGS)
    assert (thin.width, thin.height) == (500, 1)
    tiny = normalize(encoded(Image.new("RGB", (1, 1)), "JPEG"), SETTINGS)
    assert (tiny.width, tiny.height) == (1, 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda jpeg: b"", "empty"),
        (lambda jpeg: b"<html>not found</html>", "not an image"),
        (lambda jpeg: bytes(len(jpeg)), "not an image"),
        (lambda jpeg: jpeg[:20], "broken JPEG"),
        (lambda jpeg: jpeg[: len(jpeg) // 2], "broken JPEG"),
        (lambda jpeg: jpeg[:-200], "broken JPEG"),
        (lambda jpeg: jpeg[:1500] + bytes(500) + jpeg[2000:], "broken JPEG"),
        (lambda jpeg: jpeg[:1500] + bytes(len(jpeg) - 1500), "broken JPEG"),
    ],
)
def test_damaged_jpegs_are_rejected(picture: Image.Image, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    # libjpeg itself would only warn about most of these, and fill in grey.
    with pytest.raises(Rejected, match=reason):
        normalize(damage(encoded(class_image(2, 3, 200, 150), "JPEG")), SETTINGS)


def test_truncated_png_is_rejected(picture: Image.Image) -> None:
    with pytest.raises(Rejected, match="broken PNG"):
        normalize(encoded(picture, "PNG")[:-300], SETTINGS)


def test_stray_bytes_before_the_end_are_harmless(picture: Image.Image) -> None:
    jpeg = encoded(picture, "JPEG")
    padded = jpeg[:-2] + b"\x00\x00\x00" + jpeg[-2:]
    assert normalize(padded, SETTINGS).width == 120


def test_decompression_bomb_is_rejected_unread() -> None:
    header = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = (65000).to_bytes(2, "big") * 2  # says that it is 65,000 × 65,000
    with pytest.raises(Rejected, match="pixels"):
        normalize(bytes(header), SETTINGS)


def test_statistics_are_those_of_the_pixels() -> None:
    result = normalize(encoded(Image.new("RGB", (64, 64), (255, 128, 0)), "PNG"), SETTINGS)
    assert result.channel_means is not None and result.channel_means[0] == pytest.approx(
        (1, 128 / 255, 0), abs=0.01
    )
    assert result.channel_means[1] == pytest.approx((1, (128 / 255) ** 2, 0), abs=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_apply_exif_turns_images_upright(picture: Image.Image, orientation: int, kind: str) -> None:
    """Against Pillow's own idea of upright; without --apply-exif the pixels stay as they lie in the file."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(picture, kind, exif=tags, **options)
    as_stored = np.asarray(picture).astype(int)
    upright = np.asarray(ImageOps.exif_transpose(with_orientation(picture, orientation))).astype(int)
    for settings, expected in ((SETTINGS, as_stored), (ImageSettings(apply_exif=True), upright)):
        pixels = decode(content, settings)
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < (8 if kind == "JPEG" else 0.01)


def with_orientation(picture: Image.Image, orientation: int) -> Image.Image:
    copy = picture.copy()
    copy.getexif()[0x0112] = orientation
    return copy


def test_cap_on_the_shortest_side() -> None:
    content = encoded(Image.new("RGB", (900, 600)), "JPEG")
    result = normalize(content, ImageSettings(resolution_cap=300, cap_side="shortest"))
    assert (result.width, result.height) == (450, 300)
    kept = normalize(content, ImageSettings(resolution_cap=600, cap_side="shortest", encode="lossless"))
    assert kept.jpeg == content


@pytest.mark.parametrize("side", [1000, 2100, 4800])
def test_large_photos_are_scaled_well(side: int) -> None:
    """Decoding at a fraction must give what decoding and resizing gives, within what one can see."""
    photo = class_image(2, 3, 60, 48).resize((side, side * 4 // 5), Image.Resampling.BICUBIC)
    content = encoded(photo, "JPEG", quality=95)
    result = normalize(content, SETTINGS)
    assert (result.width, result.height) == (500, 400)
    reference = np.asarray(Image.open(io.BytesIO(content)).resize((500, 400), Image.Resampling.BILINEAR))
    ours = simplejpeg.decode_jpeg(result.jpeg)
    assert np.abs(ours.astype(int) - reference).mean() < 2


def test_subsampling_444_keeps_the_chroma() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255  # red and blue columns of one pixel
    content = encoded(Image.fromarray(stripes), "PNG")
    errors = {}
    for subsampling in ("420", "444"):
        jpeg = normalize(content, ImageSettings(subsampling=subsampling, quality=95)).jpeg  # type: ignore[arg-type]
        errors[subsampling] = np.abs(simplejpeg.decode_jpeg(jpeg).astype(int) - stripes).mean()
    assert errors["444"] < 10 < errors["420"]


def test_lossless_statistics_are_those_of_all_pixels(picture: Image.Image) -> None:
    content = encoded(picture, "JPEG", quality=95, subsampling=0)
    settings = ImageSettings(encode="lossless")
    result = normalize(content, settings)
    pixels = simplejpeg.decode_jpeg(content)[::4, ::4].reshape(-1, 3) / 255
    assert result.channel_means is not None
    assert result.channel_means[0] == pytest.approx(pixels.mean(0), abs=1e-9)
    assert result.channel_means[1] == pytest.approx((pixels**2).mean(0), abs=1e-9)
    assert normalize(content, settings, statistics=False).channel_means is None


@pytest.mark.parametrize("statistics", [True, False])
def test_lossless_still_finds_damage(picture: Image.Image, statistics: bool) -> None:
    content = encoded(picture, "JPEG", quality=95)
    with pytest.raises(Rejected, match="broken JPEG"):
        normalize(content[: len(content) * 2 // 3], ImageSettings(encode="lossless"), statistics)


PEAK = """
import sys
from data_prep.manifest import ImageSettings
from data_prep.normalize import normalize
content = open(sys.argv[1], "rb").read()
peaks = []
for _ in range(2):
    peaks += [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    result = normalize(content, ImageSettings()) if len(peaks) == 1 else None
print(int(peaks[1]) - int(peaks[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "I;16", "CMYK"])
def test_memory_for_large_images_is_bounded(tmp_path: Path, mode: str) -> None:
    """Little more than the pixels as they lie in the file, whatever has to be done with them."""
    side = 5000
    image = Image.new(mode, (side, side))
    options: dict[str, object] = {"transparency": bytes(range(256))} if mode == "P" else {}
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    path = tmp_path / "large"
    path.write_bytes(encoded(image, "JPEG" if mode == "CMYK" else "PNG", **options))
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    in_file = {"P": 1, "I;16": 2}.get(mode, 4)
    assert int(result.stdout) << 10 < side * side * in_file + (90 << 20)


@pytest.mark.parametrize(("kind", "limit"), [("PNG", MAX_PIXELS), ("WEBP", MAX_WEBP_PIXELS)])
def test_too_many_pixels_are_rejected_unread(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    content = encoded(picture, kind)
    monkeypatch.setattr("data_prep.pillow_decode.MAX_PIXELS", 9599 if kind == "PNG" else limit)
    monkeypatch.setattr("data_prep.pillow_decode.MAX_WEBP_PIXELS", 9599 if kind == "WEBP" else limit)
    with pytest.raises(Rejected, match="more than 9,599 pixels"):
        decode(content)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_tiles_leave_no_seams(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile by tile, shrunk or not, the pixels are those of the whole image at once."""
    photo = class_image(2, 3, 611, 407)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    if mode == "RGBA":
        image.putalpha(photo.convert("L"))
    content = encoded(image, "PNG")
    for settings in (None, ImageSettings(resolution_cap=50)):
        monkeypatch.setattr("data_prep.pillow_decode.TILE_SIDE", 4096)
        whole = decode(content, settings)
        assert whole.shape == ((407, 611, 3) if settings is None else (68, 102, 3))
        monkeypatch.setattr("data_prep.pillow_decode.TILE_SIDE", 100)
        assert (decode(content, settings) == whole).all()


def test_large_arrays_are_capped_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.asarray(class_image(2, 3, 300, 200))
    expected = cap_resolution(pixels, 123)
    monkeypatch.setattr("data_prep.normalize.RESIZED_BY_CHANNEL", 1)
    assert (cap_resolution(pixels, 123) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_always_divided_by_257(kind: str) -> None:
    """A dark image stays as dark beside its neighbours as it was."""
    for values in (np.arange(65536).reshape(256, 256), np.arange(256).reshape(16, 16)):
        pixels = decode(encoded(Image.fromarray(values.astype(np.uint16)), kind))
        assert (pixels == np.round(values / 257)[..., None]).all()


def test_32_bit_images_count_as_16_bits_or_are_rejected() -> None:
    # Pillow before 11.3 opens a 16-bit PNG so, and what it holds is then within 0..65535.
    values = np.array([[0, 255], [30_000, 65_535]], np.int32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"))
    assert pixels[..., 0].tolist() == [[0, 1], [117, 255]]
    for wrong in (values - 1, values + 1, values.astype(np.float32)):
        with pytest.raises(Rejected, match="save it with 8 or 16 bits"):
            decode(encoded(Image.fromarray(wrong), "TIFF"))


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("garbage", [b"", b"\x00garbage\x17", b"\xff\xff\xff"])
def test_many_scans_are_found_behind_garbage(picture: Image.Image, progressive: bool, garbage: bytes) -> None:
    jpeg = encoded(picture, "JPEG", progressive=progressive)
    first = jpeg.index(b"\xff\xda")
    marker = re.search(rb"\xff[^\x00]", jpeg[first + 12 :])
    assert marker is not None
    scan = jpeg[first : first + 12 + marker.start()]
    second = 4 + int.from_bytes(jpeg[4:6], "big")  # where JFIF's segment ends
    many = jpeg[:second] + garbage + jpeg[second:first] + scan * 300 + jpeg[first:]
    # A baseline image is whole after its first scan; libjpeg itself refuses a second one then.
    with pytest.raises(Rejected, match=r"more than (200 scans|one scan)"):
        normalize(many, SETTINGS)


def test_what_only_looks_like_scans_does_not_count(picture: Image.Image) -> None:
    """In a segment, or after the end, as in a photo with a film behind it."""
    jpeg = encoded(picture, "JPEG", progressive=True)
    noise = b"\xff\xda\x00\x02" * 300
    comment = b"\xff\xfe" + (len(noise) + 2).to_bytes(2, "big") + noise
    assert normalize(jpeg[:2] + comment + jpeg[2:] + noise, SETTINGS).width == 120
