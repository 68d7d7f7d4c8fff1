"""Augmentation on the device: what it does to images, labels and random numbers."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2

from tests.conftest import class_image
from train.config import AugmentationSection, RandAugmentSection
from train.data.batch import Normalize
from train.data.device_augment import DeviceAugment
from train.data.device_augment.__main__ import main
from train.data.device_augment.draws import Draws
from train.data.device_augment.policy import (
    OPERATIONS,
    RAND_AUGMENT,
    TRIVIAL_AUGMENT,
    PolicyDraw,
    Space,
    draw_policy,
    magnitudes,
)

FILL = (0.2, 0.4, 0.6)
EVERYTHING: dict[str, Any] = {
    "vertical_flip": True,
    "rotation_degrees": 30,
    "shear_degrees": 10,
    "zoom": (0.8, 1.2),
    "translation": 0.1,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "rand_augment": RandAugmentSection(),
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "mix_probability": 0.8,
}
ALONE = [{name: value} for name, value in EVERYTHING.items() if name != "mix_probability"]
ALONE.append({"trivial_augment": True})


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth_images(count: int, height: int = 32, width: int = 28, seed: int = 0) -> torch.Tensor:
    """Images without edges, so that interpolation differs little: uint8, shape (count, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    fine = interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * fine).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def flat_images(colours: list[float], side: int = 16) -> torch.Tensor:
    return torch.tensor(colours).to(torch.uint8)[:, None, None, None].expand(-1, side, side, 3).contiguous()


def augment(images: torch.Tensor, seed: int = 0, fill: tuple[float, ...] = FILL, **options: Any) -> Any:
    section = AugmentationSection(**options)
    return DeviceAugment(section, fill)(images, torch.arange(len(images)), seed)


def pixels_of(images: torch.Tensor, seed: int = 0, **options: Any) -> torch.Tensor:
    return augment(images, seed, **options)[0]


# What holds whatever is configured


@pytest.mark.parametrize(
    "options", [EVERYTHING, *ALONE], ids=lambda o: "all" if len(o) > 1 else next(iter(o))
)
def test_contract_of_every_option(options: dict[str, Any]) -> None:
    for shape in [(5, 33, 27), (1, 8, 8), (2, 9, 8)]:
        images = smooth_images(*shape)
        before = images.clone()
        results = [augment(images, seed, **options) for seed in (3, 3, 4, 5, 6, 7, 8)]
        pixels, targets = results[0]
        assert pixels.dtype == torch.float32 and pixels.shape == images.shape and pixels.is_contiguous()
        assert pixels.min() >= 0 and pixels.max() <= 255.001
        assert torch.equal(images, before)
        assert torch.equal(targets.labels, torch.arange(len(images)))
        assert torch.equal(pixels, results[1][0])
        assert any(not torch.equal(pixels, other[0]) for other in results[2:]) or shape[0] == 1
        is_mixing = "mixup" in options or "cutmix" in options
        assert (targets.share is not None) == (targets.other_labels is not None) == is_mixing
        assert targets.dense(8).sum(1).allclose(torch.ones(len(images)))
        assert Normalize((0.5,) * 3, (0.2,) * 3)(pixels).shape == (shape[0], 3, *shape[1:])


def test_global_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    images = smooth_images(6)
    first = [augment(images, 1, **options)[0] for options in (EVERYTHING, {"trivial_augment": True})]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1] and random.getstate() == states[2]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    second = [augment(images, 1, **options)[0] for options in (EVERYTHING, {"trivial_augment": True})]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_seed_counts_in_all_its_bits() -> None:
    """torch's own generator sees the lower 32: a step number further up would be lost."""
    draws = [Draws(seed, torch.device("cpu")).uniform(3).tolist() for seed in (7, 7 + 2**32, 7 + 2**70, -7)]
    assert len({tuple(numbers) for numbers in draws}) == 4


def test_an_image_hangs_on_its_place_only() -> None:
    """Other images of the batch do not matter, and equal images get different draws."""
    options = {name: value for name, value in EVERYTHING.items() if "mix" not in name}
    images = smooth_images(6)
    others = smooth_images(6, seed=1)
    others[2] = images[2]
    assert torch.allclose(pixels_of(images, **options)[2], pixels_of(others, **options)[2], atol=1e-3)
    same = images[:1].expand(6, -1, -1, -1)
    results = pixels_of(same, **options)
    assert len({tuple(result.flatten().tolist()) for result in results}) == 6


def test_nothing_configured_is_identity() -> None:
    nothing = DeviceAugment(AugmentationSection(), FILL)
    images = smooth_images(3)
    assert nothing.is_identity and torch.equal(nothing(images, torch.arange(3), 0)[0], images.float())
    assert DeviceAugment(AugmentationSection(mixup=0.2, mix_probability=0), FILL).is_identity
    assert not any(DeviceAugment(AugmentationSection(**options), FILL).is_identity for options in ALONE)
    with pytest.raises(ValueError, match="fill must be three values"):
        DeviceAugment(AugmentationSection(), (124.0, 116.0, 104.0))


def test_autocast_around_it_changes_nothing() -> None:
    images = smooth_images(28)
    plain = pixels_of(images, trivial_augment=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixels_of(images, trivial_augment=True), plain)


@pytest.mark.parametrize("options", [EVERYTHING, {"trivial_augment": True}], ids=["all", "trivial_augment"])
def test_host_never_looks_at_the_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of device meta has no values: whatever would wait for one, or mixes devices up, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    images = torch.empty(40, 16, 16, 3, dtype=torch.uint8, device="meta")
    labels = torch.empty(40, dtype=torch.int64, device="meta")
    pixels, targets = DeviceAugment(AugmentationSection(**options), FILL)(images, labels, 0)
    assert pixels.device.type == "meta" and pixels.shape == images.shape
    if targets.share is not None and targets.other_labels is not None:
        assert targets.share.device.type == targets.other_labels.device.type == "meta"


@pytest.mark.parametrize("options", ALONE, ids=lambda options: next(iter(options)))
def test_without_kornia(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    name = next(iter(options))
    if name in ("vertical_flip", "random_erasing", "mixup", "cutmix"):
        augment(smooth_images(2), **options)
        return
    with pytest.raises(ValueError) as fault:
        augment(smooth_images(2), **options)
    assert str(fault.value) == f"augmentation.{name} needs Kornia: pip install kornia, or remove it"


# Moving pixels


def test_vertical_flip() -> None:
    images = smooth_images(200, 8, 9)
    pixels = pixels_of(images, vertical_flip=True)
    is_flipped = [torch.equal(p, i.flip(0).float()) for p, i in zip(pixels, images, strict=True)]
    is_kept = [torch.equal(p, i.float()) for p, i in zip(pixels, images, strict=True)]
    assert all(one != other for one, other in zip(is_flipped, is_kept, strict=True))
    assert 70 < sum(is_flipped) < 130


def test_vertical_flip_is_part_of_the_one_map() -> None:
    images = smooth_images(40, 17, 13)
    pixels = pixels_of(images, vertical_flip=True, zoom=(1.0 - 1e-9, 1.0))
    near = [torch.allclose(p, i.flip(0).float(), atol=0.05) for p, i in zip(pixels, images, strict=True)]
    assert 8 < sum(near) < 32
    assert all(
        torch.allclose(pixels[row], images[row].float(), atol=0.05) for row in range(40) if not near[row]
    )


def bar_images(count: int, side: int = 65) -> torch.Tensor:
    """A white bar from the centre to the right: its direction can be measured."""
    images = torch.zeros(count, side, side, 3, dtype=torch.uint8)
    middle = side // 2
    images[:, middle - 2 : middle + 3, middle : middle + side // 3] = 255
    return images


def centroids(pixels: torch.Tensor) -> torch.Tensor:
    """Centre of gravity, relative to the middle of the image: to the right, down; shape (n, 2)."""
    weights = pixels.mean(3).double()
    height, width = weights.shape[1:]
    columns, rows = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    total = weights.sum((1, 2))
    return (
        torch.stack([(weights.sum(1) @ columns.double()), (weights.sum(2) @ rows.double())], 1)
        / total[:, None]
    )


def test_rotation_turns_each_image_by_its_own_angle() -> None:
    images = bar_images(200)
    radius = centroids(images.float())[0].norm()
    for limit in (180.0, 40.0):
        places = centroids(pixels_of(images, fill=(0, 0, 0), rotation_degrees=limit))
        assert places.norm(dim=1).allclose(radius, rtol=0.01)
        angles = torch.rad2deg(torch.atan2(-places[:, 1], places[:, 0]))
        assert limit - 8 < angles.max() <= limit + 0.5 and -limit - 0.5 <= angles.min() < -limit + 8
        assert len(set(angles.round(decimals=2).tolist())) > 190 and abs(angles.mean()) < limit / 6


def test_zoom_stays_within_its_factors() -> None:
    images = torch.zeros(100, 64, 64, 3, dtype=torch.uint8)
    images[:, 22:42, 22:42] = 255
    area = (pixels_of(images, fill=(0, 0, 0), zoom=(0.5, 1.5)).mean(3) / 255).sum((1, 2))
    factors = (area / 400).sqrt()
    assert 0.49 < factors.min() < 0.55 and 1.45 < factors.max() < 1.51
    assert factors.mean() == pytest.approx(1, abs=0.08)


def test_translation_is_a_fraction_of_the_side() -> None:
    images = torch.zeros(200, 40, 80, 3, dtype=torch.uint8)
    images[:, 18:22, 38:42] = 255
    places = centroids(pixels_of(images, fill=(0, 0, 0), translation=0.25))
    most = places.abs().amax(0)
    assert 18 < most[0] <= 20.01 and 9 < most[1] <= 10.01
    assert len({tuple(place) for place in places.round(decimals=2).tolist()}) > 190


def test_shear_moves_rows_along_themselves() -> None:
    images = torch.zeros(100, 65, 65, 3, dtype=torch.uint8)
    images[:, 10:13, 30:35] = 255  # 21 rows above the middle
    places = centroids(pixels_of(images, fill=(0, 0, 0), shear_degrees=30))
    assert places[:, 1].allclose(torch.tensor(-21.0).double(), atol=0.1)
    limit = 21 * torch.deg2rad(torch.tensor(30.0)).tan()
    assert 0.9 * limit < places[:, 0].abs().max() <= limit + 0.1 and places[:, 0].std() > limit / 3


def test_what_comes_from_outside_has_the_fill_colour() -> None:
    pixels = pixels_of(flat_images([250.0] * 8), translation=1.0, rotation_degrees=180)
    is_fill = (pixels - 255 * torch.tensor(FILL)).abs().amax(3) < 0.05
    is_image = (pixels - 250).abs().amax(3) < 0.05
    assert 0.2 < is_fill.float().mean() < 0.95 and (is_fill | is_image).float().mean() > 0.9
    normalized = Normalize(FILL, (0.2, 0.2, 0.2))(pixels)
    assert normalized.permute(0, 2, 3, 1)[is_fill].abs().max() < 0.01


# Colour


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_factors(name: str) -> None:
    """A picture of two colours near the middle, so that nothing is clipped, tells the factor."""
    images = torch.zeros(200, 8, 8, 3)
    images[:, :4] = torch.tensor([110.0, 120.0, 130.0])
    images[:, 4:] = torch.tensor([100.0, 90.0, 80.0])
    options: dict[str, Any] = {name: 0.5}
    pixels = pixels_of(images.to(torch.uint8), **options)
    if name == "saturation":
        spread, before = pixels[:, 0, 0, 2] - pixels[:, 0, 0, 0], 20.0
    elif name == "contrast":
        spread, before = pixels[:, 0, 0, 0] - pixels[:, 7, 0, 0], 10.0
    else:
        spread, before = pixels[:, 0, 0, 0], 110.0
    factors = spread / before
    assert 0.49 < factors.min() < 0.53 and 1.47 < factors.max() < 1.51
    assert factors.mean() == pytest.approx(1, abs=0.08)
    gray = pixels @ torch.tensor([0.299, 0.587, 0.114])
    if name == "saturation":
        assert gray.allclose(gray[:1].expand_as(gray), atol=0.1)
    elif name == "contrast":
        assert gray.mean((1, 2)).allclose(gray.mean(), atol=0.1)


def test_hue_turns_the_colour_circle() -> None:
    red = torch.zeros(200, 8, 8, 3, dtype=torch.uint8)
    red[..., 0] = 200
    pixels = pixels_of(red, hue=1 / 6)[:, 0, 0]
    assert pixels[:, 0].allclose(torch.tensor(200.0), atol=0.01)  # up to yellow and to magenta, red stays
    assert (torch.minimum(pixels[:, 1], pixels[:, 2]) < 0.01).all()
    turns = (pixels[:, 1] - pixels[:, 2]) / 200 / 6
    assert 0.155 < turns.max() <= 0.1667 and -0.1667 <= turns.min() < -0.155
    anywhere = pixels_of(red, hue=0.5)[:, 0, 0]
    assert (anywhere.amax(1) - 200).abs().max() < 0.01 and anywhere.amin(1).max() < 0.01
    assert torch.bincount(anywhere.argmax(1)).min() > 45  # as often green or blue as red


# RandAugment and TrivialAugment

PEERS = {
    RAND_AUGMENT: v2.RandAugment(interpolation=InterpolationMode.BILINEAR, fill=[255 * v for v in FILL]),
    TRIVIAL_AUGMENT: v2.TrivialAugmentWide(
        interpolation=InterpolationMode.BILINEAR, fill=[255 * v for v in FILL]
    ),
}
# Levels of 255. torchvision cuts off fractions after each step, in the grey image that Color and Contrast
# blend with as well, and rounds the fill colour.
TOLERANCE = {"Identity": 0.001, "Brightness": 1, "Posterize": 0.01, "Solarize": 0.01, "Equalize": 0.01}
GEOMETRIC = OPERATIONS[1:6]


@pytest.mark.parametrize("space", PEERS, ids=["rand_augment", "trivial_augment"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision(space: Space, name: str) -> None:
    """The same images and magnitudes; of geometric ones, the pixels that do not touch the border's blend."""
    from train.data.device_augment.pixels import apply_policy

    peer = PEERS[space]
    height, width = 48, 40
    levels, signs = (
        torch.tensor([0, 7, 9, 15, 22, 30]).repeat(2),
        torch.tensor([-1.0, 1.0]).repeat_interleave(6),
    )
    images = smooth_images(12, height, width).permute(0, 3, 1, 2)
    operations = torch.full((12,), OPERATIONS.index(name))
    ours = magnitudes(space, operations, levels.double() / 30, signs.double(), height, width)
    results = 255 * apply_policy(
        images.float() / 255,
        [PolicyDraw(operations, ours)],
        torch.tensor(FILL),
        Draws(0, torch.device("cpu")),
    )
    table, is_signed = peer._AUGMENTATION_SPACE[name]
    theirs = table(31, height, width)
    for row, level in enumerate(levels.tolist()):
        magnitude = 0.0 if theirs is None else float(theirs[level]) * (float(signs[row]) if is_signed else 1)
        if name.startswith("Translate"):
            magnitude = round(magnitude * 1000) / 1000  # its int(15.999999) is 15
            assert ours[row] == int(magnitude)
        else:
            assert float(ours[row]) == pytest.approx(magnitude, abs=1e-5)

        def theirs_of(image: torch.Tensor, magnitude: float = magnitude) -> torch.Tensor:
            return peer._apply_image_or_video_transform(
                image, name, magnitude, interpolation=peer.interpolation, fill=peer._fill
            ).float()

        difference = (results[row] - theirs_of(images[row])).abs()
        if name in GEOMETRIC:
            black, white = (theirs_of(torch.full((3, height, width), level)) for level in (0.0, 255.0))
            span = (white - black).amin(0)  # 255 inside, 0 outside, between them where both are blended
            difference = difference[:, (span > 254.99) | (span < 1e-4)]
            assert difference.shape[1] > 0.85 * height * width
        assert difference.max() <= TOLERANCE.get(name, 0.6 if name in GEOMETRIC else 2), level


def test_solarize_turns_the_level_of_the_threshold() -> None:
    """Every level at every threshold, also where the threshold is a level, such as 170."""
    from train.data.device_augment.pixels import apply_policy

    levels = torch.arange(256).view(1, 16, 16).expand(31, 3, 16, 16)
    thresholds = 1 - torch.arange(31, dtype=torch.float64) / 30
    solarize = PolicyDraw(torch.full((31,), OPERATIONS.index("Solarize")), thresholds)
    results = apply_policy(levels / 255, [solarize], torch.tensor(FILL), Draws(0, torch.device("cpu")))
    exact = torch.tensor([255 * (30 - k) for k in range(31)]).view(31, 1, 1, 1)
    expected = torch.where(levels * 30 >= exact, 255 - levels, levels)
    assert torch.equal((255 * results).round().long(), expected)


def test_autocontrast_leaves_flat_channels_alone() -> None:
    from train.data.device_augment.pixels import autocontrast

    flat = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(autocontrast(flat), flat)


def test_policies_draw_every_operation_both_ways() -> None:
    draws = Draws(0, torch.device("cpu"))
    rounds = draw_policy(draws, RandAugmentSection(num_ops=3, magnitude=9), 2000, 40, 40)
    assert len(rounds) == 3 and not torch.equal(rounds[0].operations, rounds[1].operations)
    counts = torch.bincount(rounds[0].operations, minlength=14)
    assert counts.min() > 100 and counts.max() < 190
    brightness = rounds[0].magnitudes[rounds[0].operations == OPERATIONS.index("Brightness")]
    assert brightness.abs().allclose(torch.tensor(0.27).double())
    assert 0.35 < (brightness > 0).double().mean() < 0.65
    (only,) = draw_policy(draws, None, 5000, 40, 40)
    degrees = only.magnitudes[only.operations == OPERATIONS.index("Rotate")]
    assert degrees.abs().max() == 135 and len(degrees.unique()) > 50 and abs(degrees.mean()) < 15


def test_each_image_gets_its_own_operations_in_turn() -> None:
    """Sorted by operation and put back: as if each image were alone."""
    from train.data.device_augment.pixels import apply_policy

    images = smooth_images(40, 16, 16).permute(0, 3, 1, 2).float() / 255
    draws, fill = Draws(0, torch.device("cpu")), torch.tensor(FILL)
    rounds = draw_policy(draws, RandAugmentSection(num_ops=3, magnitude=20), 40, 16, 16)
    together = apply_policy(images, rounds, fill, draws)
    for row in range(40):
        one = slice(row, row + 1)
        alone = [PolicyDraw(drawn.operations[one], drawn.magnitudes[one]) for drawn in rounds]
        assert torch.allclose(apply_policy(images[one], alone, fill, draws)[0], together[row], atol=1e-3)


# Erasing and mixing


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_random_erasing(probability: float) -> None:
    """One rectangle of the fill colour, of 2 to 33 % of the area; the rest untouched."""
    images = smooth_images(300, 40, 50).clamp(min=200)
    pixels = pixels_of(images, random_erasing=probability)
    is_erased = (pixels - 255 * torch.tensor(FILL)).abs().amax(3) < 0.01
    assert torch.equal(pixels[~is_erased], images.float()[~is_erased])
    shares = is_erased.double().mean((1, 2))
    hit = shares[shares > 0]
    assert abs(len(hit) / 300 - probability) < 0.08
    assert 0.015 < hit.min() < 0.05 and 0.28 < hit.max() < 0.345
    heights, widths = is_erased.any(2).sum(1), is_erased.any(1).sum(1)
    assert torch.equal(heights * widths, is_erased.sum((1, 2)))  # rectangles
    aspects = (heights / widths)[shares > 0]
    assert 0.25 < aspects.min() < 0.6 and 1.6 < aspects.max() < 3.7
    assert torch.stack([is_erased[:, :4].any(), is_erased[:, -4:].any(), is_erased[:, :, -4:].any()]).all()


def test_erasing_comes_before_mixing() -> None:
    """What is erased is seen through by what is mixed in."""
    pixels, targets = augment(flat_images([250.0] * 64), fill=(0, 0, 0), random_erasing=1.0, mixup=1.0)
    other = 1 - targets.share
    shown = torch.stack(
        [(image[..., 0, None] - 250 * s).abs().min() for image, s in zip(pixels, other, strict=True)]
    )
    assert (shown < 0.01).sum() > 40  # erased here, whole in the partner


def test_mixup_is_the_weighted_sum() -> None:
    images = smooth_images(64)
    pixels, targets = augment(images, mixup=0.4)
    share = targets.share.double()[:, None, None, None]
    expected = share * images.double() + (1 - share) * images[targets.other_labels].double()
    assert (pixels - expected).abs().max() < 1e-4
    assert sorted(targets.other_labels.tolist()) == list(range(64))
    assert len(targets.share.unique()) == 64 and targets.share.dtype == torch.float32
    dense = targets.dense(64)
    assert dense[torch.arange(64), targets.labels].allclose(
        torch.where(targets.labels == targets.other_labels, 1.0, targets.share)
    )


def test_cutmix_share_is_the_area() -> None:
    images = flat_images(list(range(0, 250, 5)), side=23)
    pixels, targets = augment(images, cutmix=1.0)
    own = images.float()
    partner = own[targets.other_labels]
    is_cut = (pixels != own).any(3)
    assert torch.equal(torch.where(is_cut[..., None], partner, own), pixels)
    differs = targets.labels != targets.other_labels
    assert (1 - is_cut.double().mean((1, 2)))[differs].allclose(targets.share.double()[differs])
    heights, widths = is_cut.any(2).sum(1), is_cut.any(1).sum(1)
    assert torch.equal(heights * widths, is_cut.sum((1, 2)))
    assert targets.share[differs].min() < 0.3 and targets.share[differs].max() > 0.8


def test_mixup_and_cutmix_share_the_images() -> None:
    images = flat_images([float(value) for value in torch.randperm(250)], side=16)
    pixels, targets = augment(images, mixup=1.0, cutmix=1.0, mix_probability=0.6)
    num_levels = torch.tensor([len(image.unique()) for image in pixels])
    is_cut = num_levels == 2
    is_unmixed = targets.share == 1
    is_blended = ~is_cut & ~is_unmixed
    assert torch.equal(pixels[is_unmixed], images.float()[is_unmixed])
    assert 0.3 < is_unmixed.double().mean() < 0.5
    assert 0.2 < is_cut.double().mean() < 0.4 and 0.2 < is_blended.double().mean() < 0.4


@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 8.0])
def test_beta_has_its_moments(alpha: float) -> None:
    shares = Draws(0, torch.device("cpu")).beta(20_000, alpha)
    assert shares.isfinite().all() and shares.min() >= 0 and shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


# The sheet


def test_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {path: nowhere, resolution: 32}\nschedule: {phases: [{kind: constant, epochs: 1}]}\n"
    )
    for number in range(2):
        class_image(number, 0, 50, 40).save(tmp_path / f"{number}.png")
    words = [str(recipe), str(tmp_path / "0.png"), str(tmp_path / "1.png"), "augmentation.mixup=0.4"]
    words += ["augmentation.rotation_degrees=30", "--out", str(tmp_path / "sheet.png")]
    assert main(words) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * (160 + 4) + 4 and sheet.height == 2 * (160 + 20) + 4
    assert "2 image(s)" in capsys.readouterr().out


def test_sheet_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, picture, text = tmp_path / "recipe.yaml", tmp_path / "a.png", tmp_path / "b.jpg"
    recipe.write_text("data: {path: nowhere, resolution: 32}\n")
    text.write_text("no image")
    class_image(0, 0, 50, 40).save(picture)
    cases: list[tuple[list[Any], str]] = [
        ([recipe, text], "b.jpg cannot be read as an image"),
        ([recipe, tmp_path / "c.jpg"], "c.jpg is no file"),
        ([recipe, tmp_path], "is no file"),
        ([recipe, "augmentation.mixup=1"], "name 1 to 64 images"),
        ([recipe, picture, "augmentation.mixip=1"], "did you mean mixup"),
        ([tmp_path / "none.yaml", picture], "there is no such file"),
        ([recipe, picture, "--out", tmp_path / "no" / "sheet.png"], "cannot be written"),
        ([recipe, picture, "--out", tmp_path / "sheet.xyz"], "cannot be written"),
    ]
    for words, sentence in cases:
        assert main([str(word) for word in words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said and "Traceback" not in said
