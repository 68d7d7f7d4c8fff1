"""A sheet that shows what a recipe does to some images: the original on the left, then seven draws.

    python -m train.data.device_augment configs/demo.yaml a.jpg b.jpg --out sheet.png augmentation.cutmix=1

Crop and horizontal flip of section `data` are part of it. The images are one batch, so MixUp and CutMix mix
them with each other; the line under a picture then says which images it shows, and in what shares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_prep.manifest import load_manifest
from train.config import Recipe, RecipeError, load_recipe
from train.data.augment import Augmentation
from train.data.batch import Targets
from train.data.device_augment import DeviceAugment
from train.data.resize import resize_area

NUM_DRAWS = 7
MAX_IMAGES = 64
_GAP, _LINE = 4, 16  # pixels between pictures, and below each for a line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.device_augment",
        description="write a sheet of images as a recipe augments them",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("words", nargs="+", metavar="IMAGE | section.key=value")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="default: sheet.png")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in options.words if word not in overrides]
    try:
        recipe = load_recipe(options.recipe, overrides)
        if not 0 < len(paths) <= MAX_IMAGES:
            raise ValueError(f"name 1 to {MAX_IMAGES} images (given: {len(paths)})")
        pictures = [_read(path) for path in paths]
        sheet = draw_sheet(recipe, pictures, [path.stem for path in paths])
        _save(sheet, options.out)
    except (RecipeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(paths)} image(s), the original and {NUM_DRAWS} draws of each")
    return 0


def draw_sheet(recipe: Recipe, pictures: list[np.ndarray], names: list[str]) -> Image.Image:
    """The originals on the left, then NUM_DRAWS draws of each, at the resolution that training ends with.

    Args:
        pictures: uint8, shape (height, width, 3) each.
        names: of the pictures, to be written below.

    Raises:
        ValueError: an option needs a library that is not installed.
    """
    side = recipe.data.resolution_at(recipe.num_epochs)
    still, moving = (
        Augmentation(
            is_random=is_random,
            seed=recipe.run.seed,
            crop_scale=recipe.data.crop_scale,
            crop_aspect=recipe.data.crop_aspect,
            horizontal_flip=recipe.data.horizontal_flip,
        )
        for is_random in (False, True)
    )
    original = _cropped(pictures, still, 0, side)
    device_augment = DeviceAugment(recipe.augmentation, _fill(recipe, original))
    columns, lines = [original.numpy()], [names]
    for draw in range(NUM_DRAWS):
        cropped = _cropped(pictures, moving, draw, side)
        images, targets = device_augment(cropped, torch.arange(len(names)), seed=recipe.run.seed + draw)
        columns.append(images.round().clamp(0, 255).to(torch.uint8).numpy())
        lines.append([_shares(targets, row, names) for row in range(len(names))])
    return _paste(columns, lines)


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{path} cannot be read as an image") from None


def _save(sheet: Image.Image, path: Path) -> None:
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from None


def _cropped(pictures: list[np.ndarray], rule: Augmentation, epoch: int, side: int) -> torch.Tensor:
    """As the loader would crop them: uint8, shape (n, side, side, 3)."""
    heights, widths = np.array([picture.shape[:2] for picture in pictures]).T
    boxes, flips = rule.boxes_and_flips(epoch, np.arange(len(pictures)), widths, heights)
    crops = []
    for picture, (top, left, height, width), is_flipped in zip(pictures, boxes, flips, strict=True):
        crop = picture[top : top + height, left : left + width]
        resized = resize_area(torch.from_numpy(np.ascontiguousarray(crop)), side)
        crops.append(resized.flip(1) if is_flipped else resized)
    return torch.stack(crops)


def _fill(recipe: Recipe, images: torch.Tensor) -> list[float]:
    """Mean colour of the data set, or of these images where it is not at hand."""
    is_remote = str(recipe.data.path).startswith("s3://")
    if not is_remote and Path(recipe.data.path).is_dir():
        return list(load_manifest(recipe.data.path).mean)
    return (images.double().mean((0, 1, 2)) / 255).tolist()


def _shares(targets: Targets, row: int, names: list[str]) -> str:
    """Which images a mixed one shows, e.g. `70% a, 30% b`; nothing below one that is not mixed."""
    if targets.share is None or targets.other_labels is None or targets.share[row] == 1:
        return ""
    other = int(targets.other_labels[row])
    percent = round(100 * float(targets.share[row]))
    return "with itself" if other == row else f"{percent}% {names[row]}, {100 - percent}% {names[other]}"


def _paste(columns: list[np.ndarray], lines: list[list[str]]) -> Image.Image:
    """Put pictures and lines on a white sheet; small pictures are shown larger, in whole multiples."""
    num_rows, side = len(columns[0]), columns[0].shape[1]
    factor = max(1, 160 // side)
    step = factor * side + _GAP
    sheet = Image.new("RGB", (len(columns) * step + _GAP, num_rows * (step + _LINE) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, (pictures, below) in enumerate(zip(columns, lines, strict=True)):
        for row, (picture, line) in enumerate(zip(pictures, below, strict=True)):
            left, top = _GAP + column * step, _GAP + row * (step + _LINE)
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(large), (left, top))
            while pen.textlength(line, font) > factor * side:
                line = line[:-1]
            pen.text((left, top + factor * side + 1), line, "black", font)
    return sheet


if __name__ == "__main__":
    sys.exit(main())
