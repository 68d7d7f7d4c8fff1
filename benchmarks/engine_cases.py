"""One training of `engine_speed.py`, in a process of its own: ours, timm's, torchvision's, or the bare step.

Every system runs its own program, from its own command line, to a point inside of its first epoch. What is
replaced is where batches come from: they lie in memory, as that system's own loader would hand them out (see
`batches_for`). The source of batches is also the clock: it is asked for batch n when step n may begin, waits
for the device at two of them, and then ends the program, which so never comes to validation.

    python benchmarks/engine_cases.py JOB.json RESULT.json
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import yaml
from torch import nn

NUM_CLASSES = 1000
NUM_BATCHES_IN_MEMORY = 4  # more than one, so that nothing can be kept from the last step
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING, RATE = 0.9, 1e-4, 0.1, 0.01
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOP_OPERATIONS = 12


class UnavailableError(Exception):
    """This system cannot do this; the sentence says why."""


class Finished(BaseException):
    """Enough steps were taken."""


@dataclass(frozen=True)
class Job:
    """What one process is to train.

    Attributes:
        system: ours, ours-real, timm, torchvision or bare.
        mode: default (the system's own command), tuned (its fastest without compilation) or compiled.
        num_skipped: steps before the clock starts. num_steps: all of them.
        data: a prepared data set, for ours. sources: folders with the peers' programs.
        profile: run the counted steps of ours under torch's profiler.
    """

    system: str
    mode: str
    precision: str
    model: str
    side: int
    batch_size: int
    num_skipped: int
    num_steps: int
    device: str
    num_threads: int
    data: str
    scratch: str
    sources: dict[str, str]
    profile: bool = False


class Clock:
    """Times the steps between two requests for a batch.

    A program may ask one batch ahead: then both requests come one step early, and as many steps lie between.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = self._cpu_began = math.nan
        self._profiler: Any = None
        self.result: dict[str, Any] = {}

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Hand out `batches`, an endless row.

        Raises:
            Finished: at the end of the measurement.
        """
        for position in itertools.count():
            if position == self._job.num_skipped:
                self._begin()
            if position == self._job.num_steps:
                self._end()
                raise Finished
            yield next(batches)

    def _begin(self) -> None:
        self._wait()
        if self._job.profile:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._cpu_began, self._began = time.process_time(), time.perf_counter()

    def _end(self) -> None:
        self._wait()
        seconds = time.perf_counter() - self._began
        steps = self._job.num_steps - self._job.num_skipped
        images = steps * self._job.batch_size
        cpu_seconds = (
            time.process_time() - self._cpu_began
        )  # of all threads: other work on the machine moves it less
        self.result = {
            "images_per_second": images / seconds,
            "cpu_seconds_a_thousand": 1000 * cpu_seconds / images,
        }
        if self._profiler is not None:
            self._profiler.stop()
            self.result["profile"] = _where_time_goes(self._profiler, seconds, steps)
        if self._job.device == "cuda":
            self.result["peak_bytes"] = torch.cuda.max_memory_allocated()

    def _wait(self) -> None:
        if self._job.device == "cuda":
            torch.cuda.synchronize()


class Source:
    """Stands where a DataLoader would."""

    def __init__(self, job: Job, clock: Clock) -> None:
        self._job, self._clock = job, clock
        self.dataset = self.sampler = self.batch_sampler = self.collate_fn = None

    def __len__(self) -> int:
        return 10 * self._job.num_steps  # further than the measurement gets

    def __iter__(self) -> Iterator[Any]:
        return self._clock.timed(itertools.cycle(batches_for(self._job)))


def batches_for(job: Job) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images as the system's loader yields them, in pinned memory where there is a GPU.

    Ours: uint8 NHWC. timm (with its PrefetchLoader around it): uint8 NCHW. Both normalize on the device.
    torchvision: float32 NCHW, normalized by its transforms in the workers, whose time so does not count.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(NUM_BATCHES_IN_MEMORY):
        shape = (job.batch_size, job.side, job.side, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, NUM_CLASSES, (job.batch_size,), generator=generator)
        if job.system in ("timm", "torchvision"):
            images = images.permute(0, 3, 1, 2).contiguous()
        if job.system == "torchvision":
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
            images = (images / 255 - mean) / std
        if job.device == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        batches.append((images, labels))
    return batches


def run_ours(job: Job, clock: Clock) -> None:
    """Our training command; with `ours-real` on the prepared data, decoded by our own loader."""
    from train.__main__ import main
    from train.data.batch import Batch
    from train.data.loaders.base import Loader

    original = Loader.epoch

    def epochs(loader: Loader, resolution: int) -> Iterator[Batch]:
        for number in itertools.count():
            yield from original(loader, number, resolution=resolution)

    def in_memory() -> Iterator[Batch]:
        ids = torch.arange(job.batch_size)
        return itertools.cycle([Batch(images, labels, ids) for images, labels in batches_for(job)])

    def timed(loader: Loader, epoch: int, start_sample: int = 0, *, resolution: int) -> Iterator[Batch]:
        return clock.timed(epochs(loader, resolution) if job.system == "ours-real" else in_memory())

    cast(Any, Loader).epoch = timed
    recipe = Path(job.scratch) / "engine.yaml"
    recipe.write_text(yaml.safe_dump(our_recipe(job)))
    code = main([str(recipe)])
    raise UnavailableError(f"our training ended by itself with code {code}: see its words above")


def our_recipe(job: Job) -> dict[str, Any]:
    """The defaults of a recipe, but for what the comparison fixes."""
    model: dict[str, Any] = {"library": "timm", "name": job.model, "compile": job.mode == "compiled"}
    data = {
        "path": job.data,
        "global_batch_size": job.batch_size,
        "resolution": job.side,
        "crop_scale": [0.08, 1.0],
        "normalization": "imagenet",
    }
    sgd = {"name": "sgd", "peak_lr": RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    return {
        "run": {"folder": f"{job.scratch}/runs", "preflight": False},
        "data": data,
        "model": model,
        "loss": {"label_smoothing": LABEL_SMOOTHING},
        "optimizer": sgd,
        # More epochs than are needed: an epoch of a small data set has few steps.
        "schedule": {"phases": [{"kind": "constant", "epochs": job.num_steps + 1}]},
        "validation": {"resolution": job.side},
        "precision": {"mode": job.precision},
        "tracking": {"mlflow": False},
    }


def run_timm(job: Job, clock: Clock) -> None:
    """timm's train.py by its command line; its datasets and its loader's inside are replaced."""
    folder = Path(job.sources["timm"])
    sys.path.insert(0, str(folder))  # a whole checkout brings its own timm along
    import timm.data
    from timm.data.loader import PrefetchLoader

    def create_loader(*_: Any, device: Any, img_dtype: Any, mean: Any, std: Any, **__: Any) -> PrefetchLoader:
        source = cast(Any, Source(job, clock))
        return PrefetchLoader(source, mean=mean, std=std, device=device, img_dtype=img_dtype)

    replaced = cast(Any, timm.data)
    replaced.create_dataset = lambda *_, **__: SimpleNamespace()
    replaced.create_loader = create_loader
    words = ["--data-dir", job.data, "--val-split", "", "--output", job.scratch, "--device", job.device]
    words += ["--model", job.model, "--num-classes", str(NUM_CLASSES), "--batch-size", str(job.batch_size)]
    words += ["--input-size", "3", str(job.side), str(job.side), "--epochs", "1", "--warmup-epochs", "0"]
    words += [
        "--opt",
        "sgd",
        "--lr",
        str(RATE),
        "--momentum",
        str(MOMENTUM),
        "--smoothing",
        str(LABEL_SMOOTHING),
    ]
    words += ["--weight-decay", str(WEIGHT_DECAY)]
    if job.precision != "fp32":
        words += ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[job.precision]]
    if job.mode != "default":
        words += ["--channels-last"]
        words += ["--opt-kwargs", "fused=True"] if job.device == "cuda" else []
    if job.mode == "compiled":
        words += ["--torchcompile"]
    sys.argv = [str(folder / "train.py"), *words]
    runpy.run_path(str(folder / "train.py"), run_name="__main__")


def run_torchvision(job: Job, clock: Clock) -> None:
    """torchvision's references/classification/train.py; its data sets and DataLoader are replaced."""
    if job.precision == "bf16" or (job.precision == "fp16" and job.device != "cuda"):
        raise UnavailableError("torchvision's reference knows fp32, and fp16 on CUDA")
    if job.mode != "default":
        raise UnavailableError("torchvision's reference has no such setting: see its default")
    folder = Path(job.sources["torchvision"])
    sys.path.insert(0, str(folder))  # for its presets, transforms, sampler and utils
    spec = importlib.util.spec_from_file_location("torchvision_reference", folder / "train.py")
    assert spec is not None and spec.loader is not None
    reference: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    dataset = SimpleNamespace(classes=[str(label) for label in range(NUM_CLASSES)])
    reference.load_data = lambda *_, **__: (dataset, dataset, None, None)
    torch.utils.data.DataLoader = lambda *_, **__: Source(job, clock)  # type: ignore[assignment,misc]
    words = [
        "--model",
        job.model,
        "--device",
        job.device,
        "--batch-size",
        str(job.batch_size),
        "--epochs",
        "1",
    ]
    words += ["--lr", str(RATE), "--momentum", str(MOMENTUM), "--wd", str(WEIGHT_DECAY)]
    words += ["--label-smoothing", str(LABEL_SMOOTHING), "--output-dir", job.scratch]
    words += ["--amp"] if job.precision == "fp16" else []
    reference.main(reference.get_args_parser().parse_args(words))


def run_bare(job: Job, clock: Clock) -> None:
    """Normalize, forward, backward, update: what no loop can leave out. Channels-last, as ours."""
    import timm

    device = torch.device(job.device)
    torch.backends.cudnn.benchmark = True
    model = timm.create_model(job.model, num_classes=NUM_CLASSES)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    called = cast(nn.Module, torch.compile(model)) if job.mode == "compiled" else model
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    fused = True if job.device == "cuda" else None
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)
    scaler = torch.amp.GradScaler(job.device, enabled=job.precision == "fp16")
    autocast = torch.autocast(job.device, DTYPES.get(job.precision), enabled=job.precision != "fp32")
    mean, std = (255 * torch.tensor(values, device=device) for values in (MEAN, STD))
    for images, labels in Source(job, clock):
        on_device, wanted = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        normalized = ((on_device.float() - mean) / std).permute(0, 3, 1, 2)
        with autocast:
            logits = called(normalized)
        scaler.scale(criterion(logits.float(), wanted)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


SYSTEMS = {
    "bare": run_bare,
    "ours": run_ours,
    "ours-real": run_ours,
    "timm": run_timm,
    "torchvision": run_torchvision,
}


def _where_time_goes(profiler: Any, seconds: float, steps: int) -> dict[str, Any]:
    """Milliseconds a step by operation (of the device, else of the CPU), and how busy the device was."""
    events = profiler.key_averages()
    on_device = sum(event.self_device_time_total for event in events)
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    largest = sorted(events, key=lambda event: -getattr(event, key))[:TOP_OPERATIONS]
    return {
        "milliseconds_a_step": 1e3 * seconds / steps,
        "device_busy_fraction": on_device / 1e6 / seconds if on_device else None,
        "operations": {event.key: getattr(event, key) / 1e3 / steps for event in largest},
    }


def main() -> None:
    job_path, result_path = (Path(word) for word in sys.argv[1:3])
    job = Job(**json.loads(job_path.read_text()))
    torch.set_num_threads(job.num_threads)
    clock = Clock(job)
    try:
        SYSTEMS[job.system](job, clock)
    except Finished:
        pass
    except UnavailableError as error:
        clock.result = {"unavailable": str(error)}
    result_path.write_text(json.dumps(clock.result))


if __name__ == "__main__":
    main()
    # Loaders may have threads that wait for a consumer; there is nothing left to be tidied up.
    sys.stdout.flush()
    os._exit(0)
