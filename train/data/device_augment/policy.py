"""What RandAugment and TrivialAugment draw: an operation and a magnitude for each image.

Space and ranges are those of torchvision.transforms.v2 (RandAugment: Cubuk et al., 2020; TrivialAugmentWide:
Müller & Hutter, 2021), where a magnitude counts from 0 to 30.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from train.config import RandAugmentSection
from train.data.device_augment.draws import Draws

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
MAX_MAGNITUDE = 30
_SIGNED = torch.tensor([name in OPERATIONS[1:10] for name in OPERATIONS])


@dataclass(frozen=True)
class Space:
    """What the operations do at the greatest magnitude.

    Attributes:
        shear: tangent of the angle.
        translation: fraction of the side, or None for `translation_pixels`.
        rotation: degrees.
        enhancement: deviation of the factor from 1, of brightness, colour, contrast and sharpness.
        posterized_bits: taken away, of 8.
    """

    shear: float
    translation: float | None
    rotation: float
    enhancement: float
    posterized_bits: int
    translation_pixels: int = 32


RAND_AUGMENT = Space(0.3, 150 / 331, 30, 0.9, 4)
TRIVIAL_AUGMENT = Space(0.99, None, 135, 0.99, 6)  # 32 pixels whatever the resolution, as in the paper


@dataclass(frozen=True)
class PolicyDraw:
    """One operation for each image, on the host.

    Attributes:
        operations: int64, shape (n,): ordinals in OPERATIONS.
        magnitudes: float64, shape (n,): the shear's tangent, pixels, degrees, factor - 1, bits that stay, or
            the threshold in [0, 1]; 0 where an operation has none.
    """

    operations: torch.Tensor
    magnitudes: torch.Tensor


def draw_policy(
    draws: Draws, rand_augment: RandAugmentSection | None, count: int, height: int, width: int
) -> list[PolicyDraw]:
    """The rounds of operations for a batch: `num_ops` of RandAugment, or the one of TrivialAugment."""
    space = TRIVIAL_AUGMENT if rand_augment is None else RAND_AUGMENT
    rounds = []
    for _ in range(1 if rand_augment is None else rand_augment.num_ops):
        operations = draws.integers(count, len(OPERATIONS))
        if rand_augment is None:
            levels = draws.integers(count, MAX_MAGNITUDE + 1).double() / MAX_MAGNITUDE
        else:
            levels = torch.full((count,), rand_augment.magnitude / MAX_MAGNITUDE, dtype=torch.float64)
        signs = torch.where(draws.uniform(count) < 0.5, -1.0, 1.0).double()
        rounds.append(PolicyDraw(operations, magnitudes(space, operations, levels, signs, height, width)))
    return rounds


def magnitudes(
    space: Space,
    operations: torch.Tensor,
    levels: torch.Tensor,
    signs: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """Magnitudes in the units of PolicyDraw.

    Args:
        operations: int64, shape (n,): ordinals in OPERATIONS.
        levels: float64, shape (n,), from 0 to 1: magnitude / 30.
        signs: float64, shape (n,): -1 or 1; heeded where an operation has two directions.

    Returns:
        float64, shape (n,).
    """
    across = space.translation_pixels if space.translation is None else space.translation * width
    down = space.translation_pixels if space.translation is None else space.translation * height
    strongest = torch.tensor(
        [0, space.shear, space.shear, across, down, space.rotation, *[space.enhancement] * 4, 0, 0, 0, 0],
        dtype=torch.float64,
    )
    result = strongest[operations] * levels
    # Whole pixels: a shift must not blur. The small number makes up for 14.999999.
    is_shift = (operations == 3) | (operations == 4)
    result = torch.where(is_shift, (result + 1e-6).floor(), result)
    result = torch.where(_SIGNED[operations], result * signs, result)
    result = torch.where(operations == 10, (8 - levels * space.posterized_bits).round(), result)
    return torch.where(operations == 11, 1 - levels, result)
