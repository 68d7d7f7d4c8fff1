"""Exact top-1, top-5 and loss over a split: every sample counts once, at any world size.

A recipe may look at the split in several ways (resolution, crop, mirrored images, averaged weights); each
view has a name, and every figure says which one it is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from train.config import Recipe
from train.data.batch import Normalize
from train.data.loaders import Loader
from train.distributed import Ranks

ASK_EVERY_BATCHES = 8  # whether to stop; the ranks wait for each other then


@dataclass(frozen=True)
class View:
    """One way to look at the validation split.

    Attributes:
        name: empty for the headline.
        resolution: side in pixels. crop_ratio: of the shorter side.
        flip_average: whether the logits are the mean of an image's and its mirror image's.
        weights: `model`, or `ema`.
    """

    name: str
    resolution: int
    crop_ratio: float
    flip_average: bool
    weights: str

    @property
    def words(self) -> str:
        """`256 px, crop 0.875, flip average, ema`."""
        parts = [f"{self.resolution} px", f"crop {self.crop_ratio:g}"]
        parts += ["flip average"] * self.flip_average + ["ema"] * (self.weights == "ema")
        return ", ".join(parts)


def views_of(recipe: Recipe) -> list[View]:
    """The headline's view first, then the others in the recipe's order."""
    config = recipe.validation
    headline = View(
        "", recipe.validation_resolution, config.crop_ratio, config.flip_average, recipe.headline_weights
    )
    others = [
        View(
            name=name,
            resolution=view.resolution or headline.resolution,
            crop_ratio=headline.crop_ratio if view.crop_ratio is None else view.crop_ratio,
            flip_average=headline.flip_average if view.flip_average is None else view.flip_average,
            weights=view.weights or headline.weights,
        )
        for name, view in config.views.items()
    ]
    return [headline, *others]


@dataclass(frozen=True)
class ValidationResult:
    """Fractions and mean cross-entropy over `num_samples` samples; `correct` are the counts behind them.

    `num_damaged` samples could not be decoded: they count as wrong, and are not in the loss, which is
    infinite where nothing is left.
    """

    top1: float
    top5: float
    loss: float
    num_samples: int
    correct: tuple[int, int]
    num_damaged: int = 0


def count_topk(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """How many samples have their label among the k largest logits; a 0-dimensional tensor, no host sync.

    Of equal logits the lower label comes first, as with argmax and in `evaluation.metrics`: under bf16, ties
    are not rare. A row with a NaN is wrong, so that a broken model scores zero.

    Args:
        logits: shape (n, classes). labels: int64, shape (n,).
    """
    return count_topks(logits, labels, (k,))[0]


def count_topks(logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int]) -> list[torch.Tensor]:
    """`count_topk` for each of `ks`, in one pass over the logits."""
    own = logits.gather(1, labels[:, None])
    lower_label = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = ((logits > own) | ((logits == own) & lower_label)).sum(1)
    finite = logits.isfinite().all(1)
    return [((before < k) & finite).sum() for k in ks]


def mean_logits(model: nn.Module, images: torch.Tensor, flip_average: bool) -> torch.Tensor:
    """Logits of normalised images, or the mean with those of their mirror images: float32, (n, classes)."""
    logits = model(images).float()
    return (logits + model(images.flip(3)).float()) / 2 if flip_average else logits


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: Loader,
    normalize: Normalize,
    ranks: Ranks,
    resolution: int,
    autocast: torch.autocast,
    flip_average: bool = False,
    agreed_to_stop: Callable[[], bool] | None = None,
) -> ValidationResult | None:
    """Evaluate the unwrapped `model` on all of the loader's split; the same result on every rank.

    BatchNorm statistics must be equal on all ranks before (`Ranks.average_buffers`).

    Args:
        agreed_to_stop: called now and then, by all ranks equally often, with the same answer on all of them.

    Returns:
        None where they agreed to stop: there is no figure of a part of the split.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    # What every rank has; one more is some ranks' own.
    num_batches = math.ceil(loader.num_samples / loader.plan.batch_size) // ranks.world_size
    num_asked = 0
    for position, batch in enumerate(loader.epoch(0, resolution=resolution)):
        if agreed_to_stop is not None and position % ASK_EVERY_BATCHES == 0 and position < num_batches:
            num_asked += 1
            if agreed_to_stop():
                model.train(was_training)
                return None
        images = batch.images.to(ranks.device, non_blocking=True)
        labels = batch.labels.to(ranks.device, non_blocking=True)
        with autocast:
            logits = mean_logits(model, normalize(images), flip_average)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = count_topks(logits, labels, (1, 5))
        sums += torch.stack([*correct, loss, torch.tensor(len(labels), device=ranks.device)]).double()
    while agreed_to_stop is not None and num_asked < math.ceil(num_batches / ASK_EVERY_BATCHES):
        num_asked += 1  # of batches that did not come, damaged as a whole
        if agreed_to_stop():
            model.train(was_training)
            return None
    model.train(was_training)
    correct1, correct5, total_loss, count, num_damaged = ranks.sum([*sums.tolist(), loader.num_left_out])
    num_samples = loader.num_samples
    if count + num_damaged != num_samples:
        raise RuntimeError(
            f"validation saw {count:.0f} samples of {num_samples}, {num_damaged:.0f} are damaged: prepare or "
            "copy the data set again, and report this if all of it is intact"
        )
    return ValidationResult(
        top1=correct1 / num_samples,
        top5=correct5 / num_samples,
        loss=total_loss / count if count else math.inf,
        num_samples=num_samples,
        correct=(round(correct1), round(correct5)),
        num_damaged=round(num_damaged),
    )
