"""What a served model sees is what the training's validation saw."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.manifest import ImageSettings, Manifest
from data_prep.normalize import cap_resolution
from data_prep.normalize import decode as decode_for_training
from evaluation.stored_images import StoredImages
from serve.portable.decoding import decode
from serve.portable.limits import BadImage, Limits
from serve.portable.preprocessing import Preprocessing
from serve.portable.resize import resize_area
from tests.conftest import ROOT, class_image
from train.config import DataSection, ValidationSection
from train.data.loaders import LoaderPlan, build_loader
from train.data.resize import resize_area as resize_for_training
from train.distributed import distributed


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("resolution", "crop_ratio"), [(48, 0.875), (64, 1.0)])
def test_prepared_images_equal_the_reference_loaders_batches(
    prepared: tuple[Path, Manifest], resolution: int, crop_ratio: float
) -> None:
    folder, manifest = prepared
    stored = StoredImages(folder, "val")
    preprocessing = Preprocessing(resolution, crop_ratio, manifest.mean, manifest.std)
    with distributed() as ranks:
        plan = LoaderPlan.validation(
            folder,
            manifest,
            ValidationSection(batch_size=16, crop_ratio=crop_ratio),
            DataSection(path=folder, num_workers=0),
            ranks,
            "val",
        )
        loader = build_loader("reference", plan)
        seen = 0
        for batch in loader.epoch(0, resolution=resolution):
            for image, sample_id in zip(batch.images.numpy(), batch.sample_ids.tolist(), strict=True):
                assert np.array_equal(preprocessing(stored.jpeg(sample_id)), image)
                seen += 1
        loader.close()
    assert seen == len(stored.index)


@pytest.mark.parametrize("shape", [(20, 31), (96, 96), (150, 150), (333, 500), (500, 33), (1, 1), (97, 640)])
@pytest.mark.parametrize("side", [32, 96, 224])
def test_resizing_equals_the_trainings(shape: tuple[int, int], side: int) -> None:
    pixels = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(
        resize_area(pixels, side), resize_for_training(torch.from_numpy(pixels), side).numpy()
    )


def photo(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    return class_image(1, 3, width, height).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def transparent() -> Image.Image:
    image = photo(mode="RGBA")
    image.putalpha(photo(mode="L"))
    return image


STRANGE = {
    "grey JPEG": lambda: encoded(photo(mode="L"), "JPEG"),
    "CMYK JPEG": lambda: encoded(photo(mode="CMYK"), "JPEG"),
    "progressive JPEG": lambda: encoded(photo(), "JPEG", progressive=True),
    "JPEG turned by EXIF": lambda: encoded(photo(), "JPEG", exif=turned(6)),
    "TIFF turned by EXIF": lambda: encoded(photo(), "TIFF", exif=turned(6)),
    "PNG turned by EXIF": lambda: encoded(photo(), "PNG", exif=turned(8)),
    "16-bit PNG": lambda: encoded(
        Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27), "PNG"
    ),
    "palette PNG": lambda: encoded(photo().quantize(12), "PNG"),
    "palette GIF": lambda: encoded(photo(), "GIF"),
    "bilevel PNG": lambda: encoded(photo(mode="1"), "PNG"),
    "transparent PNG": lambda: encoded(transparent(), "PNG"),
    "grey with alpha": lambda: encoded(photo(mode="LA"), "PNG"),
    "WebP": lambda: encoded(photo(), "WEBP"),
    "BMP": lambda: encoded(photo(), "BMP"),
    "PPM": lambda: encoded(photo(), "PPM"),
    "one pixel": lambda: encoded(photo(1, 1), "PNG"),
    "a line": lambda: encoded(photo(700, 2), "PNG"),
    "above the cap": lambda: encoded(photo(901, 640), "JPEG"),
    "large JPEG": lambda: encoded(photo(2400, 1600), "JPEG"),
    "large PNG": lambda: encoded(photo(2100, 1300), "PNG"),
}


@pytest.mark.parametrize("apply_exif", [False, True])
@pytest.mark.parametrize("name", STRANGE)
def test_strange_images_are_decoded_as_in_preparation(name: str, apply_exif: bool) -> None:
    content = STRANGE[name]()
    settings = ImageSettings(apply_exif=apply_exif)
    wanted = cap_resolution(decode_for_training(content, settings), settings.resolution_cap)
    found = decode(content, Limits(), apply_exif=apply_exif, cap=settings.resolution_cap)
    assert found.shape == wanted.shape
    if name == "large JPEG":
        # libjpeg scales by eighths there, by halves here.
        assert np.abs(found.astype(int) - wanted).mean() < 8
    else:
        assert np.array_equal(found, wanted)


def test_exif_orientation_is_ignored_unless_the_training_data_were_turned() -> None:
    content = encoded(photo(60, 40), "JPEG", exif=turned(6))
    assert decode(content, Limits()).shape == (40, 60, 3)
    assert decode(content, Limits(), apply_exif=True).shape == (60, 40, 3)


@pytest.mark.parametrize(
    ("content", "fault", "words"),
    [
        (b"", "empty", "empty"),
        (b"hello", "not_an_image", "not an image: send JPEG, PNG, TIFF"),
        (b"<svg></svg>", "not_an_image", "SVG"),
        (b"\0\0\0\x1cftypheic", "not_an_image", "HEIC"),
        (encoded(photo(), "JPEG")[:700], "broken", "cut short"),
        (encoded(photo(), "PNG")[:60], "broken", "cut short"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported", "float"),
        (encoded(photo(300, 300), "PNG"), "too_many_pixels", "300 × 300"),
        (b"\xff\xd8\xff" + bytes(400_001), "too_large", "larger than"),
        (encoded(photo(), "BMP"), "unsupported", "BMP is not accepted"),
    ],
)
def test_what_is_no_image_is_one_sentence(content: bytes, fault: str, words: str) -> None:
    limits = Limits(max_bytes=400_000, max_pixels=80_000, formats=("JPEG", "PNG", "TIFF"))
    with pytest.raises(BadImage, match=words) as caught:
        decode(content, limits)
    assert caught.value.fault == fault
    assert str(caught.value).count(". ") == 0 and "0x" not in str(caught.value)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x01"
    with pytest.raises(BadImage, match="scans"):
        decode(b"\xff\xd8\xff\xe0\x00\x02" + scan * 300, Limits())


def test_the_portable_package_imports_nothing_of_ours_nor_torch() -> None:
    allowed = {"numpy", "PIL", "onnxruntime"}
    import sys

    for path in (ROOT / "serve" / "portable").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            assert roots <= allowed | set(sys.stdlib_module_names), (path, roots)
