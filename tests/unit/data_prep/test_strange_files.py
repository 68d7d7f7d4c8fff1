"""A folder of strange files, each with its fate: what users really have, through the whole of prepare."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.manifest import ImageSettings, load_index, load_keys
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from data_prep.verify import verify
from tests.conftest import class_image, write_image_folder

PICTURE = class_image(2, 5, 96, 64)


def saved(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_app1(payload: bytes) -> bytes:
    jpeg = saved("JPEG", quality=92)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def zeroed() -> bytes:
    jpeg = bytearray(saved("JPEG", quality=92))
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 400] = bytes(400)
    return bytes(jpeg)


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def many_scans() -> bytes:
    jpeg = saved("JPEG", progressive=True)
    first = jpeg.index(b"\xff\xda")
    scan = jpeg[first : jpeg.index(b"\xff", first + 20)]
    return jpeg[:first] + scan * 300 + jpeg[first:]


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


GREY16 = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
RGBA = Image.merge("RGBA", (*PICTURE.split(), PICTURE.convert("L")))

# name → bytes; every one of them is an image that people see, and so is prepared, at (width, height).
PREPARED: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "png_named.jpg": (lambda: saved("PNG"), (96, 64)),  # as n02105855_2933.JPEG
    "webp_named.png": (lambda: saved("WEBP", lossless=True), (96, 64)),
    "gif.gif": (lambda: saved("GIF"), (96, 64)),
    "animated.gif": (
        lambda: saved("GIF", save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)]),
        (96, 64),
    ),
    "bmp_without_suffix": (lambda: saved("BMP"), (96, 64)),
    "tiff.tif": (lambda: saved("TIFF"), (96, 64)),
    "ppm.ppm": (lambda: saved("PPM"), (96, 64)),
    "grey.jpg": (lambda: saved("JPEG", PICTURE.convert("L")), (96, 64)),
    "grey16.png": (lambda: saved("PNG", GREY16), (96, 64)),
    "one_bit.png": (lambda: saved("PNG", PICTURE.convert("1")), (96, 64)),
    "palette.png": (lambda: saved("PNG", PICTURE.convert("P")), (96, 64)),
    "alpha.png": (lambda: saved("PNG", RGBA), (96, 64)),
    "grey_alpha.png": (lambda: saved("PNG", RGBA.convert("LA")), (96, 64)),
    "cmyk.jpg": (lambda: saved("JPEG", PICTURE.convert("CMYK")), (96, 64)),
    "progressive.jpg": (lambda: saved("JPEG", progressive=True), (96, 64)),
    "restart.jpg": (lambda: saved("JPEG", restart_marker_blocks=3), (96, 64)),
    "444.jpg": (lambda: saved("JPEG", subsampling=0), (96, 64)),
    "422.jpg": (lambda: saved("JPEG", subsampling=1), (96, 64)),
    "rotated.jpg": (lambda: saved("JPEG", exif=exif(6)), (96, 64)),  # kept as stored
    "broken_exif.jpg": (lambda: with_app1(b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40), (96, 64)),
    "broken_xmp.jpg": (lambda: with_app1(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta"), (96, 64)),
    "bytes_after_the_end.jpg": (lambda: saved("JPEG") + b"<html>trailer</html>", (96, 64)),
    "one_pixel.png": (lambda: saved("PNG", PICTURE.resize((1, 1))), (1, 1)),
    "flat.jpg": (lambda: saved("JPEG", noise(33, 500)), (500, 33)),  # ImageNet has 500×33
    "huge.jpg": (lambda: saved("JPEG", noise(3888, 2592)), (333, 500)),  # and 2592×3888
    "long_strip.png": (lambda: saved("PNG", PICTURE.resize((70_000, 2))), (500, 1)),
}
# name → bytes, words of the reason.
QUARANTINED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "empty file"),
    "text.jpg": (lambda: b"hello, world" * 30, "not an image"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "photo.heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(100), "HEIC"),
    "half.jpg": (lambda: (j := saved("JPEG", quality=95))[: len(j) // 2], "broken JPEG"),
    "header_only.jpg": (lambda: saved("JPEG")[:100], "broken JPEG"),
    "zeroed.jpg": (zeroed, "broken JPEG"),
    "half.png": (lambda: (p := saved("PNG"))[: len(p) // 2], "broken PNG"),
    "half.webp": (lambda: (w := saved("WEBP"))[: len(w) // 2], "broken WEBP"),
    "bomb.png": (png_bomb, "more than 105,000,000 pixels"),
    "scans.jpg": (many_scans, "scans"),
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strange")
    source = write_image_folder(root / "source", num_classes=2, num_train=30, num_val=3)
    folder = source / "train" / "class_0"
    for name, (content, *_) in {**PREPARED, **QUARANTINED}.items():  # type: ignore[dict-item]
        (folder / name).write_bytes(content())
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("/nowhere/at/all.jpg")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(saved("JPEG"))  # a name that is no UTF-8
    (folder / "Thumbs.db").write_bytes(b"junk")  # not there for us
    return root


def test_there_are_enough_of_them() -> None:
    assert len(PREPARED) + len(QUARANTINED) >= 25


@pytest.mark.parametrize("shard_format", ["ffcv", "dali"])
@pytest.mark.parametrize("encode", ["q90", "lossless"])
def test_every_strange_file_meets_its_fate(strange: Path, shard_format: str, encode: str) -> None:
    out = strange / f"{shard_format}-{encode}"
    manifest = prepare(
        open_source(strange / "source"),
        PrepareOptions(
            out=out,
            format=shard_format,  # type: ignore[arg-type]
            images=ImageSettings(encode=encode),  # type: ignore[arg-type]
            num_workers=2,
            max_bad_fraction=0.5,
            progress=False,
        ),
    )
    assert manifest is not None
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["key"].rpartition("/")[2]: line["reason"] for line in lines}
    expected = {name: words for name, (_, words) in QUARANTINED.items()}
    expected |= {"pipe.jpg": "not a regular file", "dangling.jpg": "cannot be read"}
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])
    assert manifest.num_found == 66 + len(PREPARED) + len(expected) + 1
    prepared_count = sum(split.num_samples for split in manifest.splits.values())
    assert manifest.num_found == prepared_count + manifest.num_quarantined

    index, keys = load_index(out, manifest, "train"), load_keys(out, manifest, "train")
    sizes = {
        key.rpartition("/")[2]: (int(row["width"]), int(row["height"]))
        for key, row in zip(keys, index, strict=True)
    }
    for name, (_, size) in PREPARED.items():
        assert sizes[name] == size, name
    assert sizes["caf\\xe9.jpg"] == (96, 64)
    assert verify(out, progress=False)[1] == []


def test_lossless_keeps_the_bytes_of_what_is_ready(strange: Path) -> None:
    source, out = strange / "source", strange / "ffcv-lossless"
    if not (out / "manifest.json").exists():
        pytest.skip("made by the test above")
    from data_prep.manifest import load_manifest

    manifest = load_manifest(out)
    index, content = load_index(out, manifest, "train"), (out / "train.beton").read_bytes()
    kept = set()
    for key, row in zip(load_keys(out, manifest, "train"), index, strict=True):
        path = source / key
        jpeg = content[int(row["offset"]) : int(row["offset"] + row["length"])]
        if path.is_file() and jpeg == path.read_bytes():
            kept.add(path.name)
        _, _, colour, _ = simplejpeg.decode_jpeg_header(jpeg)
        assert colour == "YCbCr"
    for name in (
        "444.jpg",
        "422.jpg",
        "restart.jpg",
        "rotated.jpg",
        "broken_exif.jpg",
        "flat.jpg",
        "000.jpg",
    ):
        assert name in kept, name
    for name in ("progressive.jpg", "grey.jpg", "cmyk.jpg", "png_named.jpg", "huge.jpg"):
        assert name not in kept, name
