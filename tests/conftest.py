"""Fixtures shared by all tests: small sources and data sets, built at test time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.manifest import Manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("ffcv") and not has_ffcv:
            item.add_marker(pytest.mark.skip(reason="FFCV is not installed"))
        if item.get_closest_marker("dali") and not has_dali:
            item.add_marker(pytest.mark.skip(reason="DALI is not installed"))


def class_image(label: int, seed: int, width: int, height: int) -> Image.Image:
    """A picture whose class a small network can tell: stripes of a direction and width, random colours."""
    generator = np.random.default_rng([label, seed])
    y, x = np.mgrid[0:height, 0:width]
    angle = np.pi * label / 4
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / (3 + 3 * (label % 3)) + generator.uniform(0, 6))
    low, high = generator.integers(0, 120, 3), generator.integers(130, 256, 3)
    pixels = np.where(wave[..., None] > 0, high, low) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_image_folder(
    root: Path, num_classes: int = 3, num_train: int = 12, num_val: int = 5, seed: int = 0
) -> Path:
    """`root/train/<class>` and `root/val/<class>` with JPEGs of varying size."""
    for split, count in (("train", num_train), ("val", num_val)):
        for label in range(num_classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                generator = np.random.default_rng([seed, label, number, count])
                width, height = generator.integers(40, 90, 2)
                picture = class_image(label, seed * 1000 + number * 2 + (split == "val"), width, height)
                picture.save(folder / f"{number:03d}.jpg", quality=92)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "source")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A small data set, prepared once: 4 classes, 160 train and 43 val images; not to be written to."""
    root = tmp_path_factory.mktemp("prepared")
    source = write_image_folder(root / "source", num_classes=4, num_train=40, num_val=11)
    (source / "val" / "class_0" / "000.jpg").unlink()  # an odd number: the last validation batch is short
    out = root / "data"
    return out, prepare(open_source(source), PrepareOptions(out=out, num_workers=1, progress=False))


@pytest.fixture(scope="session")
def prepared_tars(prepared: tuple[Path, Manifest]) -> tuple[Path, Manifest]:
    """The same images as tars: the same samples with the same ids, in several shards a split."""
    out = prepared[0].parent / "tars"
    options = PrepareOptions(out=out, format="dali", num_workers=1, shard_bytes=64 << 10, progress=False)
    return out, prepare(open_source(prepared[0].parent / "source"), options)


@pytest.fixture
def copy_of_prepared(prepared: tuple[Path, Manifest], tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy that a test may damage."""
    import shutil

    def copy() -> Path:
        return Path(shutil.copytree(prepared[0], tmp_path / "copy"))

    return copy
