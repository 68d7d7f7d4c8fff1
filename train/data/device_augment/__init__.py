"""Augmentation on the device, a different draw for each image: all that section `augmentation` can say.

    python -m train.data.device_augment configs/demo.yaml a.jpg b.jpg --out sheet.png augmentation.mixup=0.2

writes a sheet that shows what a recipe does to some images.

Order: policy (RandAugment or TrivialAugment), moving pixels, colour jitter, random erasing, MixUp or CutMix.
The random numbers come from a generator on the host that is seeded for each batch, and the device is never
waited for. Crops and horizontal flips belong to the loader: see train/data/augment.py.

Example:
    >>> augment = DeviceAugment(recipe.augmentation, fill=manifest.mean)
    >>> pixels, targets = augment(batch.images.to(device), batch.labels.to(device), seed=17)
    >>> loss = criterion(model(normalize(pixels)), targets)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train.config import AugmentationSection
from train.data.batch import Targets
from train.data.device_augment.draws import Draws
from train.data.device_augment.mixing import blend, draw_mix, erasing_boxes, inside
from train.data.device_augment.policy import draw_policy

__all__ = ["DeviceAugment"]


class DeviceAugment:
    """Augments batches by a recipe's section `augmentation`.

    Args:
        config: what to do; vertical flip, random erasing, MixUp and CutMix are plain torch, the rest is
            Kornia's.
        fill: colour of what comes from outside the image or is erased: the data set's mean, red, green, blue
            in [0, 1].

    Attributes:
        is_identity: nothing is configured; the caller need not call.

    Raises:
        ValueError: an option needs Kornia, and it is not installed; or `fill` is no colour.
    """

    def __init__(self, config: AugmentationSection, fill: Sequence[float]) -> None:
        if len(fill) != 3 or not all(0 <= value <= 1 for value in fill):
            raise ValueError(f"fill must be three values in [0, 1] (given: {tuple(fill)})")
        self._config = config
        self._fill = torch.tensor(fill, dtype=torch.float32)
        self._warps = bool(
            config.rotation_degrees or config.shear_degrees or config.zoom != (1, 1) or config.translation
        )
        self._jitters = bool(config.brightness or config.contrast or config.saturation or config.hue)
        self._has_policy = config.rand_augment is not None or config.trivial_augment
        self._mixes = config.mix_probability > 0 and (config.mixup > 0 or config.cutmix > 0)
        self._needs_kornia = self._warps or self._jitters or self._has_policy
        if self._needs_kornia:
            _require_kornia(_first_kornia_option(config))
        self.is_identity = not (
            self._needs_kornia or self._mixes or config.vertical_flip or config.random_erasing
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, Targets]:
        """Augment the images of a batch, each by a draw of its own.

        Args:
            images: uint8, shape (n, h, w, 3), on any device; not changed.
            labels: int64, shape (n,), on the same device.
            seed: all that is random follows from it: make it of (seed, step, rank, micro-step).

        Returns:
            float32, shape (n, h, w, 3), from 0 to 255; and what the images show then. `other_labels` and
            `share` are None if neither MixUp nor CutMix is configured; an image that is not mixed has 1.
        """
        config, draws = self._config, Draws(seed, images.device)
        count, height, width = images.shape[:3]
        if self.is_identity or not count:
            return images.float(), Targets(labels)
        # The caller may be within autocast, where a convolution would round to 8 bits.
        with torch.autocast(images.device.type, enabled=False):
            fill = draws.send(self._fill)
            is_flipped = draws.uniform(count) < (0.5 if config.vertical_flip else 0.0)
            if config.vertical_flip and not self._warps:
                flipped = draws.send(is_flipped)[:, None, None, None]
                images = torch.where(flipped, images.flip(1), images)
            pixels = self._change_pixels(images, is_flipped, fill, draws)
            if config.random_erasing:
                boxes = erasing_boxes(draws, count, height, width, config.random_erasing)
                row = (255 * fill).expand(width, 3).contiguous()  # a colour alone is three times as slow
                pixels = torch.where(inside(draws.send(boxes), height, width), row, pixels)
            if not self._mixes:
                return pixels, Targets(labels)
            mix = draw_mix(draws, config, count, height, width)
            targets = Targets(labels, labels.index_select(0, draws.send(mix.partners)), draws.send(mix.share))
            return blend(pixels, mix, draws), targets

    def _change_pixels(
        self, images: torch.Tensor, is_flipped: torch.Tensor, fill: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        """Policy, geometry and jitter: from uint8 to float32 in 0 to 255, both (n, h, w, 3)."""
        if not self._needs_kornia:
            return images.float()
        from train.data.device_augment import pixels

        config = self._config
        count, height, width = images.shape[:3]
        # Contiguous channels: measured on a CPU, grid_sample is twice as fast as on channels-last. The change
        # of order costs nothing beside that of type, here, and beside the scaling, below.
        unit = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if self._has_policy:
            rounds = draw_policy(draws, config.rand_augment, count, height, width)
            unit = pixels.apply_policy(unit, rounds, fill, draws)
        if self._warps:
            maps = pixels.draw_affine(draws, config, is_flipped, height, width)
            unit = pixels.warp(unit, draws.send(maps), fill)
        if self._jitters:
            unit = pixels.jitter(unit, config, draws)
        result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        return torch.mul(unit.permute(0, 2, 3, 1), 255, out=result)


def _first_kornia_option(config: AugmentationSection) -> str:
    """The first option set that needs Kornia, in the order of the section."""
    neutral = AugmentationSection()
    plain = {"vertical_flip", "random_erasing", "mixup", "cutmix", "mix_probability"}
    names = [name for name in AugmentationSection.model_fields if name not in plain]
    return next(name for name in names if getattr(config, name) != getattr(neutral, name))


def _require_kornia(option: str) -> None:
    try:
        import kornia  # noqa: F401
    except ImportError:
        raise ValueError(f"augmentation.{option} needs Kornia: pip install kornia, or remove it") from None
