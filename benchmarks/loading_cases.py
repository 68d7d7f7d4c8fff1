"""The loaders that benchmarks/loading.py compares: peers as their own users run them, and ours.

Each `open_*` takes a Job and returns a Subject. Imports lie in the functions: a process loads its own case's
libraries only, and a case that lacks one is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CROP_SCALE, CROP_ASPECT, FLIP_PROBABILITY = (0.08, 1.0), (3 / 4, 4 / 3), 0.5


@dataclass(frozen=True)
class Job:
    """What one process is to measure.

    Attributes:
        data: folder with all forms of the images.
        num_images: a whole number of batches.
    """

    case: str
    side: int
    data: str
    num_images: int
    batch_size: int
    workers: int
    cold: bool = False
    change: bool = False


@dataclass(frozen=True)
class Subject:
    """A loader that is ready.

    Attributes:
        epoch: all images once, uint8 batches of NHWC or NCHW; takes the epoch's number.
        warm_up: starts threads, compiles and the like.
        first_batches: two batches of an epoch at a resolution; ours only.
        close: free threads and processes.
    """

    epoch: Callable[[int], Iterable[Any]]
    warm_up: Callable[[], Iterable[Any]]
    first_batches: Callable[[int, int], Iterable[Any]] | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        form: of the images, one of FORMS.
        backend: of ours, as in `data.loader`.
    """

    name: str
    form: str
    open: Callable[[Job, Path, str], Subject]
    backend: str = ""


class UnavailableError(Exception):
    """The case cannot be measured on this machine; the message says why."""


def open_torchvision(job: Job, folder: Path, _: str) -> Subject:
    """As torchvision's references/classification do it, up to the uint8 tensor."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(job.side, scale=CROP_SCALE, ratio=CROP_ASPECT, antialias=True),
        v2.RandomHorizontalFlip(FLIP_PROBABILITY),
        v2.PILToTensor(),
    ]
    loader = DataLoader(
        ImageFolder(str(folder / "train"), v2.Compose(steps)),
        batch_size=job.batch_size,
        shuffle=True,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    return _repeating(lambda: (images for images, _ in loader))


def open_ffcv(job: Job, folder: Path, _: str) -> Subject:
    """As FFCV's own ImageNet example does it, up to the uint8 tensor."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    decoder = RandomResizedCropRGBImageDecoder((job.side, job.side), scale=CROP_SCALE, ratio=CROP_ASPECT)
    loader = Loader(
        str(folder / "train.beton"),
        batch_size=job.batch_size,
        num_workers=job.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(FLIP_PROBABILITY), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return _repeating(lambda: (images for images, _ in loader))


def open_dali(job: Job, folder: Path, _: str) -> Subject:
    """As NVIDIA's ResNet-50 example does it on a CPU, with the reader for WebDataset's tars."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    tars = sorted(folder.glob("train-*.tar"))

    @pipeline_def(batch_size=job.batch_size, num_threads=job.workers, device_id=None, prefetch_queue_depth=2)
    def training_pipeline() -> tuple[Any, Any]:
        jpegs, labels = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            name="reader",
        )
        images = fn.decoders.image_random_crop(
            jpegs,
            device="cpu",
            output_type=types.RGB,
            random_area=CROP_SCALE,
            random_aspect_ratio=CROP_ASPECT,
            num_attempts=100,
        )
        images = fn.resize(images, size=(job.side, job.side), interp_type=types.INTERP_TRIANGULAR)
        images = fn.flip(images, horizontal=fn.random.coin_flip(probability=FLIP_PROBABILITY))
        return images, fn.pad(labels)  # the labels are digits, as many as there are

    loader = DALIGenericIterator(
        [training_pipeline()],
        ["images", "labels"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    return _repeating(lambda: (outputs[0]["images"] for outputs in loader))


def open_ours(job: Job, folder: Path, backend: str) -> Subject:
    """As training does it; the integrity check at its default."""
    import torch

    from data_prep.manifest import load_manifest
    from train.config import DataSection
    from train.data.loaders import LoaderPlan, build_loader, choose_backend
    from train.distributed import Ranks

    manifest = load_manifest(folder)
    data = DataSection(path=folder, global_batch_size=job.batch_size, crop_scale=CROP_SCALE)
    assert data.horizontal_flip and data.crop_aspect == CROP_ASPECT
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), job.workers)
    try:
        chosen, reason = choose_backend(backend, manifest.format)
        if chosen != backend:
            raise UnavailableError(f"build_loader gives {chosen} in its place: {reason}")
        loader = build_loader(backend, LoaderPlan.training(folder, manifest, data, seed=0, ranks=ranks))
    except ValueError as error:
        raise UnavailableError(str(error)) from None

    def batches(epoch: int, start_sample: int, side: int) -> Iterator[torch.Tensor]:
        return (batch.images for batch in loader.epoch(epoch, start_sample, resolution=side))

    last_two = job.num_images - 2 * job.batch_size
    return Subject(
        epoch=lambda epoch: batches(epoch, 0, job.side),
        # Not a whole epoch: the first is measured, too, because it checks the bytes of every sample.
        warm_up=lambda: batches(1000, last_two, job.side),
        first_batches=lambda epoch, side: batches(epoch, last_two, side),
        close=loader.close,
    )


def _repeating(epoch: Callable[[], Iterable[Any]]) -> Subject:
    return Subject(epoch=lambda _: epoch(), warm_up=epoch)


# Forms of the same images that cases read: the format for `prepare`; None where they are made otherwise.
FORMS: dict[str, str | None] = {"originals": None, "jpegs": None, "beton": "ffcv", "tars": "dali"}

CASES = (
    Case("torchvision ImageFolder + DataLoader, originals", "originals", open_torchvision),
    Case("torchvision ImageFolder + DataLoader, prepared JPEGs", "jpegs", open_torchvision),
    Case("FFCV, stock", "beton", open_ffcv),
    Case("DALI CPU, stock", "tars", open_dali),
    Case("ours, reference", "beton", open_ours, "reference"),
    Case("ours, ffcv", "beton", open_ours, "ffcv"),
    Case("ours, dali", "tars", open_ours, "dali"),
)


def open_case(job: Job) -> Subject:
    """Raises: UnavailableError."""
    case = next(case for case in CASES if case.name == job.case)
    try:
        return case.open(job, Path(job.data) / case.form, case.backend)
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from None


def make_forms(images: Path, data: Path, num_images: int, workers: int) -> None:
    """Write the images, repeated to `num_images`, to `data` in every form."""
    from data_prep.pipeline import PrepareOptions, prepare
    from data_prep.sources import open_source

    _copy_repeated(images, data / "originals", num_images)
    source = open_source(str(data / "originals"))
    for form, shard_format in FORMS.items():
        if shard_format:
            manifest = prepare(
                source,
                PrepareOptions(
                    out=data / form,
                    format=shard_format,  # type: ignore[arg-type]
                    num_workers=workers,
                    shard_bytes=64 << 20,
                    progress=False,
                ),
            )
            assert manifest is not None and manifest.splits["train"].num_samples == num_images
    _write_jpegs(data / "beton", data / "jpegs" / "train")


def _copy_repeated(images: Path, folder: Path, num_images: int) -> None:
    """Copies, not links: each is to have its own pages in memory, as in a real data set."""
    files = sorted(path for path in images.rglob("*") if path.is_file())
    if not files:
        raise SystemExit(f"{images} holds no images: name a folder with one folder a class")
    for number in range(num_images):
        original = files[number % len(files)]
        _copy(original, folder / "train", f"{number // len(files):05d}_")
    for original in files:  # never loaded; but `prepare` is to leave all others to train
        _copy(original, folder / "val", "")


def _copy(original: Path, split: Path, prefix: str) -> None:
    target = split / original.parent.name / (prefix + original.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(original.read_bytes())


def _write_jpegs(prepared: Path, folder: Path) -> None:
    """The bytes of the shards as files, one folder a class."""
    import numpy as np

    from data_prep.manifest import load_index, load_manifest

    manifest = load_manifest(prepared)
    (shard,) = manifest.splits["train"].shards
    content = np.memmap(prepared / shard.name, np.uint8, "r")
    for number, row in enumerate(load_index(prepared, manifest, "train")):
        target = folder / manifest.class_names[row["label"]] / f"{number:07d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content[int(row["offset"]) : int(row["offset"]) + int(row["length"])].tobytes())


def versions() -> dict[str, str]:
    """Of the libraries that decide these figures."""
    import subprocess
    from importlib.metadata import distributions

    from PIL import features

    wanted = {"torch", "torchvision", "ffcv", "numba", "pillow"}
    installed = {one.name.lower(): one.version for one in distributions()}
    found = {
        name: version
        for name, version in sorted(installed.items())
        if name in wanted or name.startswith("nvidia-dali")
    }
    found["libjpeg-turbo of Pillow"] = features.version_feature("libjpeg_turbo") or "none"
    try:  # FFCV decodes with the system's
        words = ["dpkg-query", "-W", "-f", "${Version} ", "libturbojpeg0", "libturbojpeg"]
        listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        listed = []
    found["libturbojpeg of the system"] = listed[0] if listed else "unknown"
    return found
