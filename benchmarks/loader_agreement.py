"""Do the backends of the loader see the same images? One checkpoint, validated through every one of them.

    python benchmarks/loader_agreement.py runs/intel --data data/intel
    python benchmarks/loader_agreement.py runs/intel --data data/other --any-classes

Prints the share of validation images with the same prediction as through the reference loader, the largest
difference of any logit, and the mean difference of a pixel (0–255). More rows show what our own decoding
and resizing spare: the reference loader with libjpeg's fast DCT (as FFCV's own decoders decode), and DALI
with its own filters: Gaussian (what the dali loader uses on a GPU) and triangular (DALI's default).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import simplejpeg
import torch

from data_prep.manifest import Manifest, load_manifest
from evaluation.predict import TrainedModel, load_trained
from train.data.loaders import BACKENDS, LoaderPlan, build_loader
from train.distributed import Ranks
from train.precision import build_autocast, choose_precision

PIXEL_BATCHES = 5


@contextlib.contextmanager
def _fast_dct() -> Iterator[None]:
    """The reference loader decodes as FFCV does: libjpeg's fast DCT, fancy upsampling."""

    def decode(content: torch.Tensor, *_mode: object) -> torch.Tensor:
        pixels = simplejpeg.decode_jpeg(content.numpy().tobytes(), fastdct=True, fastupsample=False)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    with mock.patch("train.data.loaders.reference.decode_jpeg", decode):
        yield


@contextlib.contextmanager
def _gaussian() -> Iterator[None]:
    with mock.patch("train.data.loaders.dali.AREA_ON_CPU", False):
        yield


@contextlib.contextmanager
def _triangular() -> Iterator[None]:
    from nvidia.dali.types import INTERP_LINEAR

    with _gaussian(), mock.patch("train.data.loaders.dali.INTERP_GAUSSIAN", INTERP_LINEAR):
        yield


CASES: dict[str, tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    **{name: (name, contextlib.nullcontext) for name in BACKENDS if name != "reference"},
    "reference, fast DCT": ("reference", _fast_dct),
    "dali, Gaussian filter": ("dali", _gaussian),
    "dali, triangular filter": ("dali", _triangular),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--any-classes", action="store_true", help="compare on a set of other classes, too")
    options = parser.parse_args()
    trained = load_trained(options.checkpoint, torch.device("cpu"))
    manifest = load_manifest(options.data)
    if manifest.class_names != trained.class_names and not options.any_classes:
        parser.error(f"{options.data} has other classes than the checkpoint: add --any-classes")
    with torch.inference_mode():
        _print_table(trained, manifest, options)


def _print_table(trained: TrainedModel, manifest: Manifest, options: argparse.Namespace) -> None:
    side = trained.recipe.validation_resolution
    judge = _pass(trained, manifest, options, "reference")
    print(f"\n{options.data.name}, {len(judge.labels):,} {options.split} images at {side} px\n")
    print("| loader | equal predictions | largest logit difference | mean pixel difference | top-1 |")
    print("|---|---|---|---|---|")
    print(f"| reference | – | – | – | {_top1(judge, options)} |")
    for case, (backend, patched) in CASES.items():
        if manifest.format not in BACKENDS[backend].formats or BACKENDS[backend].fault():
            continue
        with patched():
            other = _pass(trained, manifest, options, backend)
        equal = (other.logits.argmax(1) == judge.logits.argmax(1)).mean()
        largest = np.abs(other.logits - judge.logits).max()
        difference = np.abs(other.pixels - judge.pixels).mean()
        print(
            f"| {case} | {equal:.2%} | {largest:.2f} | {difference:.2f} | {_top1(other, options)} |",
            flush=True,
        )


@dataclass(frozen=True)
class _Pass:
    """Logits and labels of a split, and the pixels of its first batches."""

    logits: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def _pass(trained: TrainedModel, manifest: Manifest, options: argparse.Namespace, backend: str) -> _Pass:
    recipe, ranks = trained.recipe, Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    # In this process, so that the patches of the cases reach the decoding.
    data = recipe.data.model_copy(update={"num_workers": 0})
    plan = LoaderPlan.validation(options.data, manifest, recipe.validation, data, ranks, options.split)
    autocast = build_autocast(choose_precision(recipe.precision.mode, ranks.device), ranks.device)
    logits, labels, pixels = [], [], []
    with contextlib.closing(build_loader(backend, plan)) as loader:
        for batch in loader.epoch(0, resolution=recipe.validation_resolution):
            with autocast:
                output = trained.model(trained.normalize(batch.images))
            logits.append(output.float().numpy())
            labels.append(batch.labels.numpy())
            if len(pixels) < PIXEL_BATCHES:
                pixels.append(batch.images.numpy().astype(np.int16))
    return _Pass(np.concatenate(logits), np.concatenate(labels), np.concatenate(pixels))


def _top1(result: _Pass, options: argparse.Namespace) -> str:
    return "–" if options.any_classes else f"{(result.logits.argmax(1) == result.labels).mean():.2%}"


if __name__ == "__main__":
    main()
