"""Random erasing, MixUp and CutMix for a batch at once, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from train.config import AugmentationSection
from train.data.device_augment.draws import Draws

ERASED_AREA = (0.02, 0.33)  # share of the image; this and the next as in torchvision
ERASED_ASPECT = (0.3, 3.3)  # height : width
ERASING_ATTEMPTS = 10


def erasing_boxes(draws: Draws, count: int, height: int, width: int, probability: float) -> torch.Tensor:
    """Boxes of random erasing (Zhong et al., 2020; rules as in torchvision).

    Ten attempts at a random area and aspect ratio; where none fits, nothing is erased.

    Returns:
        int64 on the host, shape (count, 4): top, left, bottom, right in pixels; empty boxes for images that
        stay whole.
    """
    shape = (count, ERASING_ATTEMPTS)
    area = draws.uniform(*shape, low=ERASED_AREA[0], high=ERASED_AREA[1]) * height * width
    low, high = torch.tensor(ERASED_ASPECT, dtype=torch.float64).log().tolist()
    aspect = draws.uniform(*shape, low=low, high=high).exp()
    box_height, box_width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_height < height) & (box_width < width) & (box_height > 0) & (box_width > 0)
    first = fits.int().argmax(1, keepdim=True)
    is_erased = (draws.uniform(count) < probability) & fits.any(1)
    box_height = box_height.gather(1, first)[:, 0] * is_erased
    box_width = box_width.gather(1, first)[:, 0] * is_erased
    top = (draws.uniform(count) * (height - box_height + 1)).floor()
    left = (draws.uniform(count) * (width - box_width + 1)).floor()
    return torch.stack([top, left, top + box_height, left + box_width], dim=1).long()


def inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Which values the boxes hold: bool, shape (n, height, width, 3), on the device of the boxes.

    Args:
        boxes: int64, shape (n, 4): top, left, bottom, right.
    """
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows = torch.arange(height, device=boxes.device)
    # Written out for the three channels: a mask that is broadcast over them makes what follows twice as slow.
    columns = torch.arange(3 * width, device=boxes.device) // 3
    is_row, is_column = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (is_row[:, :, None] & is_column[:, None, :]).view(len(boxes), height, width, 3)


@dataclass(frozen=True)
class Mix:
    """Which image is mixed into which, and how; all on the host.

    Attributes:
        partners: int64, shape (n,): a permutation of the batch; image i gets pixels of image partners[i].
        boxes: int64, shape (n, 4): top, left, bottom, right of what CutMix takes from the partner; empty
            where it takes nothing.
        opacity: float64, shape (n,): of the image outside its box; below 1 for MixUp.
        share: float64, shape (n,): of the image's own label; 1 where nothing is mixed in.
    """

    partners: torch.Tensor
    boxes: torch.Tensor
    opacity: torch.Tensor
    share: torch.Tensor


def draw_mix(draws: Draws, config: AugmentationSection, count: int, height: int, width: int) -> Mix:
    """MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019), each image one of them or none."""
    partners = draws.permutation(count)
    is_mixed = draws.uniform(count) < config.mix_probability
    if config.mixup and config.cutmix:
        is_cut = draws.uniform(count) < 0.5
    else:
        is_cut = torch.full((count,), config.cutmix > 0)
    opacity = torch.ones(count, dtype=torch.float64)
    boxes = torch.zeros(count, 4, dtype=torch.int64)
    if config.mixup:
        opacity = torch.where(is_mixed & ~is_cut, draws.beta(count, config.mixup), opacity)
    if config.cutmix:
        cut = _cutmix_boxes(draws, draws.beta(count, config.cutmix), height, width)
        boxes = torch.where((is_mixed & is_cut)[:, None], cut, boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # An image is either cut or blended, so one of the two factors is 1.
    return Mix(partners, boxes, opacity, opacity * (1 - area / (height * width)))


def _cutmix_boxes(draws: Draws, share: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes around a random pixel, clipped at the border, by the rule of the authors' code.

    Clipping leaves less than the area 1 - share: labels must go by the boxes.
    """
    count = len(share)
    side = (1 - share).sqrt()
    half = torch.stack([(height * side).floor() // 2, (width * side).floor() // 2], dim=1).long()
    centre = torch.stack([draws.integers(count, height), draws.integers(count, width)], dim=1)
    limits = torch.tensor([height, width])
    first, last = (centre - half).clamp(min=0), torch.minimum(centre + half, limits)
    return torch.cat([first, last], dim=1)


def blend(images: torch.Tensor, mix: Mix, draws: Draws) -> torch.Tensor:
    """Mix partners into images.

    Args:
        images: float32, shape (n, h, w, 3).

    Returns:
        The same shape, dtype and memory order.
    """
    others = images.index_select(0, draws.send(mix.partners))
    # Asked on the host: it knows whether any image of this batch is blended, or cut.
    if bool((mix.opacity < 1).any()):
        images = torch.lerp(others, images, draws.send(mix.opacity)[:, None, None, None])
    if bool((mix.boxes[:, 2] > mix.boxes[:, 0]).any()):
        images = torch.where(inside(draws.send(mix.boxes), *images.shape[1:3]), others, images)
    return images
