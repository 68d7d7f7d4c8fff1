"""How an exported form's answers compare with its checkpoint's, on the same prepared images, both in fp32.

Example:
    >>> images = CheckImages.of_split(Path("data/intel"), "val", classifier, most=2000)
    >>> compare(reference, form, images).equal_fraction
    1.0
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.progress import progress_bar
from evaluation.stored_images import StoredImages
from serve.portable.classifier import Classifier
from serve.portable.predictions import softmax

BATCH = 32
NUM_DRAWN = 64
MIN_EQUAL = 0.999  # of a float form's answers
MIN_TOP5 = 0.99  # of its first five, in order: the fifth and sixth may be near each other
MAX_DIFFERENCE = 1e-3  # of a logit of a float form, as a part of the largest one
IN_MEMORY_BYTES = 1 << 30
Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class CheckImages:
    """Prepared images with their labels, and a sentence on what they are.

    Attributes:
        images: uint8 (n, side, side, 3). labels: int64 (n,), or None where nobody knows.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    words: str

    @classmethod
    def of_split(
        cls, folder: Path, split: Literal["train", "val"], classifier: Classifier, most: int | None
    ) -> CheckImages:
        """Evenly spread samples of a split, through the served preprocessing; `most` None: all of them."""
        ids, stored = chosen_samples(folder, split, most)
        side = classifier.info.preprocessing.resolution
        images = _room((len(ids), side, side, 3))
        with progress_bar(len(ids), f"prepare {split} images") as bar:
            for position, image in enumerate(prepared(stored, ids, classifier)):
                images[position] = image
                bar.update()
        total = len(stored.index)
        words = f"all {total:,}" if len(ids) == total else f"{len(ids):,} of {total:,}"
        labels = stored.index["label"][ids].astype(np.int64)
        return cls(images, labels, f"{words} {split} images of {folder.name}")

    @classmethod
    def drawn(cls, side: int) -> CheckImages:
        """Coloured noise at several scales, where there is no data set."""
        generator = np.random.default_rng(0)
        images = np.empty((NUM_DRAWN, side, side, 3), np.uint8)
        for image in images:
            cell = int(generator.integers(2, max(3, side // 2)))
            coarse = generator.integers(0, 256, (-(-side // cell), -(-side // cell), 3))
            image[:] = np.kron(coarse, np.ones((cell, cell, 1)))[:side, :side]
        return cls(images, None, f"{NUM_DRAWN} drawn images (no data set was named)")


@dataclass(frozen=True)
class Agreement:
    """Fractions of images, and the largest differences.

    Attributes:
        equal_fraction: same answer. same_top5_fraction: same first five classes in the same order.
        max_logit_difference, max_probability_difference: over all images and classes. max_logit: the
            checkpoint's largest absolute value.
        top1, top5: of the form; None without labels. reference_top1, reference_top5: of the checkpoint.
    """

    num_images: int
    equal_fraction: float
    same_top5_fraction: float
    max_logit_difference: float
    max_logit: float
    max_probability_difference: float
    top1: float | None
    top5: float | None
    reference_top1: float | None
    reference_top5: float | None
    images_per_second: float
    images: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def float_fault(self) -> str | None:
        """What a float form must not have: other answers than its checkpoint. None: it has none."""
        if self.equal_fraction < MIN_EQUAL:
            return f"{1 - self.equal_fraction:.2%} of its answers are others than the checkpoint's"
        if self.same_top5_fraction < MIN_TOP5:
            return f"{1 - self.same_top5_fraction:.2%} of its top-5 are others than the checkpoint's"
        if self.max_logit_difference > MAX_DIFFERENCE * max(self.max_logit, 1.0):
            return f"its logits differ from the checkpoint's by up to {self.max_logit_difference:.2g}"
        return None


def _room(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Memory for images; a file without a name where all of a large data set would be too much for it."""
    if math.prod(shape) <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # lives as long as it is mapped
        return np.memmap(file, np.uint8, "w+", shape=shape)


def logits_of(logits: Logits, images: NDArray[np.uint8], words: str = "") -> NDArray[np.float32]:
    """Logits of all images, in batches.

    Raises:
        ValueError: some are no numbers.
    """
    parts = []
    with progress_bar(len(images), f"compare {words}".strip()) as bar:
        for start in range(0, len(images), BATCH):
            parts.append(logits(images[start : start + BATCH]))
            bar.update(len(parts[-1]))
    found = np.concatenate(parts)
    if broken := int((~np.isfinite(found)).any(1).sum()):
        what = f"the {words}" if words else "the model"
        raise ValueError(f"{what} gives no numbers for {broken:,} of {len(found):,} images (NaN or infinite)")
    return found


def compare(reference: NDArray[np.float32], logits: Logits, check: CheckImages, words: str = "") -> Agreement:
    """One form against the checkpoint's logits of the same images."""
    logits(check.images[:1])  # a batch of one must do, and the first one is slow
    start = time.perf_counter()
    own = logits_of(logits, check.images, words)
    seconds = time.perf_counter() - start
    order, reference_order = _order(own), _order(reference)
    return Agreement(
        num_images=len(own),
        equal_fraction=float((order[:, 0] == reference_order[:, 0]).mean()),
        same_top5_fraction=float((order[:, :5] == reference_order[:, :5]).all(1).mean()),
        max_logit_difference=float(np.abs(own - reference).max()),
        max_logit=float(np.abs(reference).max()),
        max_probability_difference=float(np.abs(softmax(own) - softmax(reference)).max()),
        top1=_accuracy(order, check.labels, 1),
        top5=_accuracy(order, check.labels, 5),
        reference_top1=_accuracy(reference_order, check.labels, 1),
        reference_top5=_accuracy(reference_order, check.labels, 5),
        images_per_second=round(len(own) / max(seconds, 1e-9), 1),
        images=check.words,
    )


def _order(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-logits, axis=1, kind="stable")


def _accuracy(order: NDArray[np.int64], labels: NDArray[np.int64] | None, k: int) -> float | None:
    return None if labels is None else float((order[:, :k] == labels[:, None]).any(1).mean())


def chosen_samples(
    folder: Path, split: Literal["train", "val"], most: int | None
) -> tuple[NDArray[np.int64], StoredImages]:
    """Ids of evenly spread samples of a split (samples lie by class), and the split."""
    stored = StoredImages(folder, split)
    total = len(stored.index)
    if total == 0:
        raise ValueError(f"the split {split} of {folder} is empty: name a data set with images")
    count = total if most is None else min(most, total)
    return np.linspace(0, total - 1, count).astype(np.int64), stored


def prepared(
    stored: StoredImages, ids: NDArray[np.int64], classifier: Classifier
) -> Iterator[NDArray[np.uint8]]:
    """The samples as the models get them."""
    for sample_id in ids.tolist():
        yield classifier.prepare(stored.jpeg(sample_id))
