"""How many images a model still gets right when they are corrupted.

sample = stratified_sample(predictions.labels, 1000, seed=0)
result = measure_robustness(trained, images, labels, ids, kinds_of("all"), severities=(1, 3, 5))
result.mean_top1, result.relative
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.progress import progress_bar
from evaluation.metrics import wilson_interval
from evaluation.predict import TrainedModel
from evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from train.precision import build_autocast, choose_precision
from train.validation import mean_logits

CHUNK_IMAGES = 50  # corrupted and classified at a time: little memory, and Ctrl-C is heard soon

Classify = Callable[[NDArray[np.uint8]], NDArray[np.int64]]


@dataclass(frozen=True)
class CorruptionAccuracy:
    """Top-1 accuracy, with its 95% Wilson interval, under one kind of corruption at one severity."""

    kind: str
    severity: int
    num_correct: int
    top1: float
    top1_interval: tuple[float, float]


@dataclass(frozen=True)
class RobustnessResult:
    """Accuracies of the same images clean and corrupted.

    Attributes:
        num_images: of `num_in_split`; they are a sample drawn by class where there are more.
        resolution: side of the images in pixels.
        clean_top1: of these images.
        cells: one a kind and severity, in the order of kinds, then severities.
    """

    num_images: int
    num_in_split: int
    resolution: int
    seed: int
    severities: tuple[int, ...]
    clean_top1: float
    clean_top1_interval: tuple[float, float]
    cells: tuple[CorruptionAccuracy, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.kind for cell in self.cells))

    @property
    def mean_top1(self) -> float:
        """The mean over kinds and severities, each with the same weight."""
        return float(np.mean([cell.top1 for cell in self.cells]))

    @property
    def relative(self) -> float | None:
        """Mean over clean accuracy; None where the model gets no clean image right."""
        return self.mean_top1 / self.clean_top1 if self.clean_top1 else None

    def kind_mean(self, kind: str) -> float:
        """The mean over the severities of one kind."""
        return float(np.mean([cell.top1 for cell in self.cells if cell.kind == kind]))

    def group_means(self) -> dict[str, float]:
        """The mean of each group that was measured."""
        groups: dict[str, list[float]] = {}
        for kind in self.kinds:
            groups.setdefault(CORRUPTIONS[kind].group, []).append(self.kind_mean(kind))
        return {group: float(np.mean(means)) for group, means in groups.items()}

    def as_fields(self) -> dict[str, Any]:
        """What report.json says: fractions and counts."""
        fields = asdict(self)
        cells = fields.pop("cells")
        means = {"mean_top1": self.mean_top1, "relative": self.relative, "group_means": self.group_means()}
        return {"style": "ImageNet-C-style, on the fly; not comparable with published mCE"} | {
            **fields,
            **means,
            "cells": cells,
        }


@dataclass(frozen=True, eq=False)
class CorruptedExample:
    """One image under a kind of corruption ("" for none), with the label that the model gives it."""

    kind: str
    severity: int
    image: NDArray[np.uint8]
    predicted_label: int
    label: int


def stratified_sample(labels: NDArray[np.int64], num_images: int, seed: int) -> NDArray[np.int64]:
    """Positions of `num_images` samples, each class in proportion to its size (± 1), sorted; int64.

    All of them where there are no more. By seed and the order of the labels alone. Raises ValueError for
    num_images < 1.
    """
    if num_images < 1:
        raise ValueError(f"The number of images must be at least 1, not {num_images}.")
    if num_images >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    # A class's samples, shuffled, are spread evenly from 0 to 1, from a start of its own: what lies below
    # any bound is a fair share of each class.
    shuffled = rng.permutation(len(labels))
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.sort(np.argsort(places, kind="stable")[:num_images])


def measure_robustness(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    classify: Classify,
    kinds: Sequence[str],
    *,
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    num_in_split: int | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> RobustnessResult:
    """Classify every image clean and under each kind at each severity.

    Args:
        images: uint8 (n, side, side, 3). labels, sample_ids: int64 (n,).
        classify: images of that shape → predicted labels, int64 (n,): see `classifier_of`.
        num_in_split: where the images are a sample of a split; None: they are all.
        num_workers: threads that corrupt while the model computes; None: one a core. No result depends on it.

    Raises:
        ValueError: no image, no kind, or what `corrupt` refuses.
    """
    if not len(images) or not kinds or not severities:
        raise ValueError("Robustness is measured on one image, one corruption and one severity at least.")
    severities = tuple(sorted(set(severities)))
    tasks = [(kind, severity) for kind in dict.fromkeys(kinds) for severity in severities]
    chunks = [slice(start, start + CHUNK_IMAGES) for start in range(0, len(images), CHUNK_IMAGES)]
    num_correct = dict.fromkeys(tasks, 0)
    with progress_bar(len(images) * (len(tasks) + 1), "corrupt", progress) as bar:
        clean = 0
        for chunk in chunks:
            clean += int(np.count_nonzero(classify(images[chunk]) == labels[chunk]))
            bar.update(len(labels[chunk]))
        calls = (
            ((task, chunk), (images[chunk], *task, seed, sample_ids[chunk].tolist()))
            for task in tasks
            for chunk in chunks
        )
        for (task, chunk), corrupted in _in_threads(corrupt, calls, num_workers):
            num_correct[task] += int(np.count_nonzero(classify(corrupted) == labels[chunk]))
            bar.update(len(corrupted))
    num_images = len(images)
    return RobustnessResult(
        num_images=num_images,
        num_in_split=num_images if num_in_split is None else num_in_split,
        resolution=images.shape[1],
        seed=seed,
        severities=severities,
        clean_top1=clean / num_images,
        clean_top1_interval=wilson_interval(clean, num_images),
        cells=tuple(
            CorruptionAccuracy(*task, count, count / num_images, wilson_interval(count, num_images))
            for task, count in num_correct.items()
        ),
    )


def corrupted_examples(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    classify: Classify,
    kinds: Sequence[str],
    *,
    severity: int = 3,
    seed: int = 0,
) -> list[CorruptedExample]:
    """One image, clean and under each kind: the first one, in an order drawn by seed, that is got right.

    Of the first hundred of them; where all are wrong, the first. Raises ValueError as `corrupt`.
    """
    some = np.random.default_rng(seed).permutation(len(images))[:100]
    is_right = classify(images[some]) == labels[some]
    place = int(some[int(is_right.argmax())])
    image, label = images[place : place + 1], int(labels[place])
    versions = [image[0], *(corrupt(image, kind, severity, seed, [sample_ids[place]])[0] for kind in kinds)]
    predicted = classify(np.stack(versions))
    return [
        CorruptedExample(kind, severity if kind else 0, version, int(guess), label)
        for kind, version, guess in zip(["", *kinds], versions, predicted, strict=True)
    ]


def classifier_of(trained: TrainedModel) -> Classify:
    """The model as its validation uses it: precision, normalisation, flip average."""
    autocast = build_autocast(choose_precision(trained.recipe.precision.mode, trained.device), trained.device)
    flip_average = trained.recipe.validation.flip_average

    @torch.inference_mode()
    def classify(images: NDArray[np.uint8]) -> NDArray[np.int64]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(trained.device)
        with autocast:
            logits = mean_logits(trained.model, trained.normalize(batch), flip_average)
        # numpy's argmax, as everywhere in the report: of equal logits the lower label counts as larger.
        return logits.cpu().numpy().argmax(axis=1).astype(np.int64)

    return classify


def parse_severities(text: str) -> tuple[int, ...]:
    """ "1,3,5" → (1, 3, 5). Raises ValueError for anything but numbers from 1 to 5."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part in map(str, SEVERITIES) for part in parts):
        raise ValueError(f"severities are numbers from 1 to 5, such as 1,3,5, not {text[:40]!r}")
    return tuple(sorted({int(part) for part in parts}))


def _in_threads(
    function: Callable[..., Any], calls: Iterator[tuple[Any, tuple[Any, ...]]], num_workers: int | None
) -> Iterator[tuple[Any, Any]]:
    """(key, function(*arguments)) for each (key, arguments), in order, a few of them ahead.

    Threads suffice: filters, random numbers and JPEG compute without the interpreter's lock.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="corrupt")
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for key, arguments in calls:
            waiting.append((key, pool.submit(function, *arguments)))
            if len(waiting) > 2 * num_workers:  # not all at once: results take memory
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
