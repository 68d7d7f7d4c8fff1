import numpy as np
import pytest
import torch

from evaluation.robustness import neighbour_changes
from evaluation.robustness.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, corrupt, kinds_of
from tests.conftest import class_image

SIDE = 48
KINDS = list(CORRUPTIONS)


@pytest.fixture(scope="module")
def images():
    return np.stack([np.asarray(class_image(label, 3, SIDE, SIDE)) for label in range(5)])


def distance(images, kind, severity, seed=0):
    corrupted = corrupt(images, kind, severity, seed, range(len(images)))
    return float(np.abs(corrupted.astype(float) - images).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_each_corruption_changes_images_and_keeps_them_images(images, kind):
    before = images.copy()
    for severity in SEVERITIES:
        corrupted = corrupt(images, kind, severity, 0, range(5))
        assert corrupted.dtype == np.uint8 and corrupted.shape == images.shape
        assert all((corrupted[i] != images[i]).any() for i in range(5)), severity
        assert corrupted.std() > 0
    assert (images == before).all(), "the caller's images are left alone"


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_any_batch(images, kind):
    ids = [11, 7, 99, 3, 40]
    together = corrupt(images, kind, 3, 5, ids)
    order = [3, 0, 4]
    assert (corrupt(images[order], kind, 3, 5, [ids[i] for i in order]) == together[order]).all()
    assert (corrupt(images[1:2], kind, 3, 5, [7]) == together[1]).all()


@pytest.mark.parametrize(
    "kind", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur"]
)
def test_draws_differ_by_sample_and_seed(images, kind):
    twice = images[[0, 0]]
    first, second = corrupt(twice, kind, 3, 0, [1, 2])
    other_seed = corrupt(twice[:1], kind, 3, 1, [1])[0]
    assert (first != second).any() and (first != other_seed).any()


# Of snow, elastic and saturate the severities of ImageNet-C differ in kind, not in strength alone.
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"snow", "elastic", "saturate", "fog", "glass_blur"}))
def test_a_higher_severity_changes_more(images, kind):
    distances = [distance(images, kind, severity) for severity in SEVERITIES]
    assert distances == sorted(distances) and distances[-1] > 1.2 * distances[0]


def test_noise_has_the_deviation_of_the_paper():
    grey = np.full((1, 128, 128, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 1, 0, [0]).astype(float) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.02) and noise.mean() == pytest.approx(
        128 / 255, abs=0.002
    )
    salted = corrupt(grey, "impulse_noise", 5, 0, [0])
    assert (salted == 255).mean() == pytest.approx(0.135, abs=0.01)
    assert (salted == 0).mean() == pytest.approx(0.135, abs=0.01)
    photons = corrupt(grey, "shot_noise", 1, 0, [0]).astype(float) / 255
    assert photons.std() == pytest.approx(np.sqrt(128 / 255 / 60), rel=0.03)


def test_brightness_and_saturation_keep_the_hue():
    colour = np.full((1, 16, 16, 3), [120, 60, 30], np.uint8)
    brighter = corrupt(colour, "brightness", 2, 0, [0])[0, 0, 0].astype(float)
    assert brighter == pytest.approx(np.array([171, 85.5, 42.75]), abs=0.6)
    paler = corrupt(colour, "saturate", 1, 0, [0])[0, 0, 0].astype(float)
    assert paler == pytest.approx(120 - (120 - np.array([120, 60, 30])) * 0.3, abs=0.6)
    grey = np.full((1, 16, 16, 3), 90, np.uint8)
    assert (corrupt(grey, "saturate", 5, 0, [0]) == grey).all(), "grey has no hue to strengthen"


def test_lengths_scale_with_the_side():
    """A disk of blur covers the same share of the image at any resolution."""
    shares = []
    for side in (56, 112, 224):
        dot = np.zeros((1, side, side, 3), np.uint8)
        dot[
            :,
            side // 2 - side // 28 : side // 2 + side // 28,
            side // 2 - side // 28 : side // 2 + side // 28,
        ] = 255
        blurred = corrupt(dot, "defocus_blur", 5, 0, [0])[0, ..., 0].astype(float)
        shares.append((blurred > 0.5 * blurred.max()).mean())
    assert max(shares) < 1.15 * min(shares)


def test_kernels_neither_darken_nor_turn_round():
    white = np.full((1, 32, 32, 3), 200, np.uint8)
    for kind in kinds_of("blur"):
        assert np.abs(corrupt(white, kind, 5, 0, [0]).astype(int) - 200).max() <= 1, kind
    kernel = neighbour_changes._trail(6.0, 3.0, 0.0)
    middle = len(kernel) // 2
    assert kernel[middle, middle + 3] > 0 and kernel[middle, : middle - 1].sum() == 0
    assert neighbour_changes._disk(0.4).sum() == pytest.approx(1)


def test_a_warp_of_nothing_is_the_image():
    image = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    line = torch.linspace(-1, 1, 16)
    same = neighbour_changes._sample(image, *torch.meshgrid(line, line, indexing="ij"))
    assert same == pytest.approx(image, abs=1e-5)
    still = neighbour_changes.elastic(image, np.random.default_rng(0), 0.0, 1.0, 0.0)
    assert still == pytest.approx(image, abs=1e-4)


@pytest.mark.parametrize("side", [8, 33, 64])
def test_any_side_goes(side):
    images = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    for kind in KINDS:
        for severity in (1, 5):
            assert corrupt(images, kind, severity, 0, [0]).shape == images.shape


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_go(value):
    plain = np.full((1, 24, 24, 3), value, np.uint8)
    for kind in KINDS:
        assert corrupt(plain, kind, 5, 0, [0]).shape == plain.shape


def test_groups_hold_every_kind_once():
    assert sorted(kind for group in GROUPS for kind in kinds_of(group)) == sorted(KINDS)
    assert kinds_of("all") == tuple(KINDS) and len(KINDS) >= 12
    with pytest.raises(ValueError, match="choose all, noise, blur, weather, digital"):
        kinds_of("rain")


def test_what_does_not_fit_is_a_sentence(images):
    with pytest.raises(ValueError, match="did you mean gaussian_noise"):
        corrupt(images, "gausian_noise", 1, 0, range(5))
    with pytest.raises(ValueError, match="severity is 1, 2, 3, 4 or 5, not 6"):
        corrupt(images, "fog", 6, 0, range(5))
    with pytest.raises(ValueError, match="uint8"):
        corrupt(images.astype(np.float32), "fog", 1, 0, range(5))
    with pytest.raises(ValueError, match="4 sample ids for 5 images"):
        corrupt(images, "fog", 1, 0, range(4))
    with pytest.raises(ValueError, match="seed"):
        corrupt(images, "fog", 1, -1, range(5))
    with pytest.raises(ValueError, match="8 pixels"):
        corrupt(images[:, :7, :7], "fog", 1, 0, range(5))
