"""Operations on pixels for a batch at once, each image with its own parameters, on Kornia.

Images are float32, shape (n, 3, h, w), in [0, 1], and stay so. This is the one module that imports Kornia.
"""

from __future__ import annotations

import math

import torch
from kornia import enhance
from kornia.geometry.transform import warp_affine

from train.config import AugmentationSection
from train.data.device_augment.draws import Draws
from train.data.device_augment.policy import OPERATIONS, PolicyDraw

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # neighbours in OPERATIONS
_LEVELS = 255
_A_LITTLE = 1e-3  # of a level: Kornia cuts off the fraction of 255 * value, and 254.99998 must stay 255


def warp(images: torch.Tensor, maps: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Move pixels, bilinearly.

    Args:
        maps: float32, shape (n, 2, 3): from pixel (column, row) of the image to that of the result.
        fill: float32, shape (3,): colour of what comes from outside.
    """
    # Filled with zeros, less the colour: half the work of Kornia's own "fill", which samples a mask as well.
    colour = fill[:, None, None]
    height, width = images.shape[-2:]
    moved = warp_affine(images - colour, maps, (height, width), padding_mode="zeros", align_corners=True)
    return moved.add_(colour).clamp_(0, 1)


def affine_maps(linear: torch.Tensor, shift: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Maps of `warp` that do `linear` around `centre`, then `shift`.

    Args:
        linear: shape (n, 2, 2).
        shift: shape (n, 2), in pixels: to the right, down.
        centre: shape (n, 2) or (2,), in pixels: column, row; the first pixel's centre is (0, 0).
    """
    centre = centre.expand_as(shift)[..., None]
    return torch.cat([linear, centre + shift[..., None] - linear @ centre], dim=2)


def _rows(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Matrices [[a, b], [c, d]]: shape (n, 2, 2)."""
    return torch.stack([torch.stack([a, b], dim=1), torch.stack([c, d], dim=1)], dim=1)


def _rotations(degrees: torch.Tensor) -> torch.Tensor:
    """Anticlockwise as seen, rows counting downwards: shape (n, 2, 2)."""
    cosine, sine = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    return _rows(cosine, sine, -sine, cosine)


def _centre(height: int, width: int) -> torch.Tensor:
    return torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)


def draw_affine(
    draws: Draws, config: AugmentationSection, is_flipped: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """One map for all that moves pixels: flip, zoom, shear along the rows, rotation, translation, in turn.

    Each is uniform within its limits, as in torchvision's RandomAffine; what is not set does nothing.

    Args:
        is_flipped: bool, shape (n,): turned upside down.

    Returns:
        float64 on the host, shape (n, 2, 3), for `warp`.
    """
    count = len(is_flipped)
    degrees = draws.uniform(count, low=-config.rotation_degrees, high=config.rotation_degrees)
    shear = draws.uniform(count, low=-config.shear_degrees, high=config.shear_degrees)
    zoom = draws.uniform(count, low=config.zoom[0], high=config.zoom[1])
    shift = draws.uniform(count, 2, low=-config.translation, high=config.translation)
    ones, zeros = torch.ones_like(zoom), torch.zeros_like(zoom)
    flip = _rows(ones, zeros, zeros, torch.where(is_flipped, -1.0, 1.0).double())
    sheared = _rows(ones, torch.deg2rad(shear).tan(), zeros, ones)
    linear = _rotations(degrees) @ sheared @ (zoom[:, None, None] * flip)
    return affine_maps(linear, shift * torch.tensor([width, height]), _centre(height, width))


def jitter(images: torch.Tensor, config: AugmentationSection, draws: Draws) -> torch.Tensor:
    """Colour jitter: factors 1 ± what is set, hue ± a part of the colour circle.

    As torchvision's ColorJitter, but for the order of the four: drawn once for a batch (as in Kornia).
    """
    count = len(images)
    spreads = {
        "brightness": config.brightness,
        "contrast": config.contrast,
        "saturation": config.saturation,
        "hue": config.hue,
    }
    order = draws.permutation(len(spreads)).tolist()
    centred = draws.uniform(len(spreads), count, low=-1, high=1)
    deviations = draws.send(centred * torch.tensor(list(spreads.values()), dtype=torch.float64)[:, None])
    for kind in order:
        name, deviation = list(spreads)[kind], deviations[kind]
        if not spreads[name]:
            continue
        if name == "brightness":
            images = enhance.adjust_brightness_accumulative(images, 1 + deviation)
        elif name == "contrast":
            images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + deviation)
        elif name == "saturation":
            images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + deviation)
        else:
            images = enhance.adjust_hue(images, 2 * math.pi * deviation)
    return images


def apply_policy(
    images: torch.Tensor, rounds: list[PolicyDraw], fill: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """Apply one operation a round to each image.

    Each round, images are put in the order of their operations: every operation then works on a slice whose
    ends the host knows, and a round costs two gathers however many operations were drawn.
    """
    place = torch.arange(len(images))  # of each image, in the order of the last round
    for drawn in rounds:
        order = torch.argsort(drawn.operations, stable=True)
        images = images.index_select(0, draws.send(place[order]))
        sorted_draw = PolicyDraw(drawn.operations[order], drawn.magnitudes[order])
        images = _apply_sorted(images, sorted_draw, fill, draws)
        place = torch.argsort(order)
    return images.index_select(0, draws.send(place))


def _apply_sorted(images: torch.Tensor, drawn: PolicyDraw, fill: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As `apply_policy`, for images in the order of their operations."""
    height, width = images.shape[-2:]
    counts = torch.bincount(drawn.operations, minlength=len(OPERATIONS)).tolist()
    num_geometric = sum(counts[OPERATIONS.index(name)] for name in _GEOMETRIC)
    # All that move pixels are one operation with different maps.
    groups = [("Identity", counts[0]), ("Geometric", num_geometric)]
    groups += [(name, counts[OPERATIONS.index(name)]) for name in OPERATIONS[1 + len(_GEOMETRIC) :]]
    magnitudes = draws.send(drawn.magnitudes)
    parts, start = [], 0
    for name, count in groups:
        part = slice(start, start + count)
        start += count
        if not count:
            continue
        if name == "Geometric":
            maps = operation_maps(drawn.operations[part], drawn.magnitudes[part], height, width)
            parts.append(warp(images[part], draws.send(maps), fill))
        elif name == "Solarize":
            # Half a level below: whether a pixel of exactly the threshold turns must not hang on rounding.
            levels = (drawn.magnitudes[part] * _LEVELS - 1e-6).ceil() - 0.5
            parts.append(enhance.solarize(images[part], draws.send(levels / _LEVELS)))
        else:
            parts.append(_operate(name, images[part], magnitudes[part]))
    return torch.cat(parts)


def operation_maps(
    operations: torch.Tensor, magnitudes: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Maps of `warp` for shears (around the upper left corner), shifts and rotations (around the centre).

    Args:
        operations, magnitudes: as in PolicyDraw, geometric ones only.

    Returns:
        float64, shape (n, 2, 3).
    """
    zeros = torch.zeros_like(magnitudes)

    def where(name: str) -> torch.Tensor:
        return torch.where(operations == OPERATIONS.index(name), magnitudes, zeros)

    ones = torch.ones_like(magnitudes)
    linear = _rotations(where("Rotate")) @ _rows(ones, -where("ShearX"), -where("ShearY"), ones)
    shift = torch.stack([where("TranslateX"), where("TranslateY")], dim=1)
    is_shear = operations <= OPERATIONS.index("ShearY")
    corner = torch.tensor([-0.5, -0.5], dtype=torch.float64)  # half a pixel from the first one's centre
    return affine_maps(linear, shift, torch.where(is_shear[:, None], corner, _centre(height, width)))


def _operate(name: str, images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """One operation that leaves pixels where they are."""
    if name == "Identity":
        return images
    if name == "Brightness":
        return enhance.adjust_brightness_accumulative(images, 1 + magnitudes)
    if name == "Color":
        return enhance.adjust_saturation_with_gray_subtraction(images, 1 + magnitudes)
    if name == "Contrast":
        return enhance.adjust_contrast_with_mean_subtraction(images, 1 + magnitudes)
    if name == "Sharpness":
        return enhance.sharpness(images, 1 + magnitudes)
    if name == "Posterize":
        return enhance.posterize(_at_levels(images), magnitudes.round().to(torch.int32)).clamp_(max=1)
    if name == "AutoContrast":
        return autocontrast(images)
    if name == "Equalize":
        return enhance.equalize(_at_levels(images)).clamp_(max=1)
    raise ValueError(f"no operation {name}")


def _at_levels(images: torch.Tensor) -> torch.Tensor:
    """Rounded to the 256 levels that posterize and equalize count in."""
    return (images * _LEVELS).round_().add_(_A_LITTLE).div_(_LEVELS)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to the whole range; one of a single level stays as it is.

    As in torchvision and PIL. Kornia's normalize_min_max is close, but makes such a channel black.
    """
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    is_flat = high == low
    scale = 1 / torch.where(is_flat, 1.0, high - low)
    return ((images - torch.where(is_flat, 0.0, low)) * scale).clamp_(0, 1)
