"""The measurements of a preflight one after the other, each said as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from data_prep.manifest import Manifest, check_size, load_index, load_manifest
from data_prep.storage import is_s3, write_atomically
from train.check import split_faults
from train.config import Recipe
from train.cost import find_price
from train.data.batch import Normalize, normalization_statistics
from train.data.folds import class_counts_of
from train.data.loaders import LoaderPlan, build_loader, choose_backend
from train.data.order import check_batch_size
from train.data.preflight.figures import CACHE_SHARE, Figures, Rates, epochs_by_resolution
from train.data.preflight.levers import NUM_SAMPLES, loader_levers, preparation_levers
from train.data.preflight.machine import ColdRead, free_bytes, read_cold, share_of_cores, usable_ram_bytes
from train.data.preflight.measure import loader_rate, model_rate, shortened, training_step, validation_step
from train.data.preflight.report import as_json, say, say_expected
from train.data.preflight.verdict import limit_of, loading_matters, size_in_words, verdict
from train.data.staging import stage
from train.distributed import Ranks, describe_hardware, quota_in_cores, rank_cores
from train.models.build import build_model, model_fault, num_parameters
from train.precision import choose_precision
from train.tracking.console import duration

BUSY = 0.5  # processes that want a core, a core


@dataclass(frozen=True)
class Preflight:
    """What the measurements work on: one rank of `ranks.world_size`."""

    recipe: Recipe
    folder: Path  # of the data set
    manifest: Manifest
    ranks: Ranks
    seconds: float  # of each of a loader's windows, and of each model
    backend: str
    training: LoaderPlan
    validation: LoaderPlan


def preflight(recipe: Recipe, num_ranks: int | None, seconds: float, json_path: Path | None) -> str | None:
    """Measure, print, conclude; a sentence where the model failed.

    Restricts this process to the cores that one rank would have.

    Raises:
        ValueError: recipe, data and machine do not go together.
        RuntimeError: a sample is damaged.
    """
    began = time.monotonic()
    price = find_price(recipe.budget)
    parts = _prepare(recipe, num_ranks, seconds)
    ram = usable_ram_bytes()
    disk = _measure_disk(parts, ram)
    epochs_of = epochs_by_resolution(recipe)
    rates: list[Rates] = []
    with contextlib.closing(build_loader(recipe.data.loader, parts.training)) as loader:
        for resolution in sorted(epochs_of):
            rate = loader_rate(loader, resolution, seconds)
            _say_loader(parts, f"{resolution} px", rate)
            rates.append(Rates(resolution, epochs_of[resolution], rate, None))
    val_resolution = recipe.validation_resolution
    with contextlib.closing(build_loader(recipe.data.loader, parts.validation)) as loader:
        validation = Rates(val_resolution, 1.0, loader_rate(loader, val_resolution, seconds), None)
        _say_loader(parts, f"{val_resolution} px, validation", validation.loader)
    rates, validation, fault = _measure_models(parts, rates, validation)
    counts = class_counts_of(parts.manifest, recipe.data)
    figures = Figures(
        num_ranks=parts.ranks.world_size,
        num_cores=parts.ranks.num_cores,
        num_workers=parts.training.num_workers,
        shares_cores=parts.ranks.device.type == "cpu",
        num_train=sum(counts["train"]),
        num_val=sum(counts["val"]),
        validate_every_epochs=recipe.validation.every_epochs,
        data_bytes=parts.manifest.num_bytes,
        training=tuple(rates),
        validation=validation,
        usable_ram_bytes=ram,
        disk_images_per_second=None if disk.fault else disk.images_per_second,
        disk_bytes_per_second=None if disk.fault else disk.bytes_per_second,
        usd_per_hour=None if price is None else price.usd_per_hour,
    )
    if fault is None and loading_matters(figures):
        figures = _with_levers(parts, figures)
    say_expected(figures, price.source if price else None)
    sentence = verdict(figures)
    print(f"verdict: {sentence}\n(measured in {time.monotonic() - began:.0f} s)", flush=True)
    if json_path is not None:
        known = {
            "model_fault": fault,
            "disk_fault": disk.fault,
            "hardware": _hardware(parts.ranks),
            "loader_backend": parts.backend,
            "model": recipe.model.name,
            "precision": choose_precision(recipe.precision.mode, parts.ranks.device),
            "free_bytes": free_bytes(recipe.run.folder),
        }
        content = {"verdict": sentence, "limit": limit_of(sentence), **known, **as_json(figures)}
        write_atomically(json_path, (json.dumps(content, indent=1) + "\n").encode())
    return fault


def _prepare(recipe: Recipe, num_ranks: int | None, seconds: float) -> Preflight:
    folder = Path(recipe.data.path)
    if is_s3(str(recipe.data.path)):  # copied as training would copy it, which finds it there then
        folder = stage(str(recipe.data.path), recipe.data.stage_folder).folder
    manifest = load_manifest(folder)
    faults = split_faults(manifest, recipe)
    if fault := model_fault(recipe.model):
        faults.append(fault)
    if faults:
        raise ValueError("; ".join(faults))
    use_cuda = torch.cuda.is_available()
    num_ranks = num_ranks or (torch.cuda.device_count() if use_cuda else 1)
    check_batch_size(recipe.data.global_batch_size, recipe.data.accum_steps, num_ranks)
    backend, reason = choose_backend(recipe.data.loader, manifest.format)
    device = torch.device("cuda", 0) if use_cuda else torch.device("cpu")
    cores = sorted(os.sched_getaffinity(0))
    ranks = Ranks(0, num_ranks, 0, num_ranks, device, rank_cores(len(cores), quota_in_cores(), num_ranks))
    class_counts = class_counts_of(manifest, recipe.data)
    counts = " and ".join(f"{sum(counts):,} {split}" for split, counts in class_counts.items())
    print(
        f"{recipe.data.path}: {counts} images; loader {backend} ({reason})\n"
        f"one of {num_ranks} rank(s), with {ranks.num_cores} of {len(cores)} core(s), on {_hardware(ranks)}",
        flush=True,
    )
    load = os.getloadavg()[0]
    if load > BUSY * len(cores):
        say("note", f"the machine is busy already (load {load:.1f}): alone on it, a training would be faster")
    os.sched_setaffinity(0, share_of_cores(cores, max(ranks.num_cores, recipe.data.num_workers or 0)))
    if not use_cuda:
        torch.set_num_threads(ranks.num_cores)
    training = LoaderPlan.training(folder, manifest, recipe.data, recipe.run.seed, ranks)
    validation = LoaderPlan.held_out(folder, manifest, recipe.validation, recipe.data, ranks)
    return Preflight(
        recipe, folder, manifest, ranks, seconds, backend, shortened(training), shortened(validation)
    )


def _hardware(ranks: Ranks) -> str:
    return describe_hardware(replace(ranks, world_size=1)).removeprefix("1 × ")


def _say_loader(parts: Preflight, at: str, rate: float) -> None:
    workers = min(max(1, parts.training.num_workers), parts.ranks.num_cores)
    say("loader", f"{at}: {rate:,.0f} images/s, {rate / workers:,.0f} a core")


def _measure_disk(parts: Preflight, ram: int | None) -> ColdRead:
    data_bytes = parts.manifest.num_bytes
    if ram is None:
        told = "how much memory there is, this system does not say"
    elif data_bytes <= CACHE_SHARE * ram:
        told = "fits the page cache: from the second epoch on nothing is read from the disk"
    else:
        told = "does not fit the page cache: every epoch reads from the disk"
    usable = "" if ram is None else f" of shards, {size_in_words(ram)} of memory usable"
    say("memory", f"{size_in_words(data_bytes)}{usable}: {told}")
    shards, index = _train_files(parts)
    # All ranks read at once; none of their maps of the shards may be there yet, or nothing could be dropped.
    num_threads = max(1, parts.training.num_workers) * parts.ranks.world_size
    cold = read_cold(shards, index, num_threads, parts.seconds)
    speed = (
        f"read cold by {num_threads} thread(s): {cold.bytes_per_second / 1e6:,.0f} MB/s, "
        f"{cold.images_per_second:,.0f} images/s ({cold.num_images} samples)"
    )
    if cold.fault:
        speed = f"speed unknown: {cold.fault}"
    elif data_bytes > cold.bytes_per_second:
        speed += f"; the first epoch reads for at least {duration(data_bytes / cold.bytes_per_second)}"
    say("disk", speed)
    return cold


def _train_files(parts: Preflight) -> tuple[list[Path], np.ndarray]:
    folder, split = parts.folder, parts.manifest.splits["train"]
    for shard in split.shards:
        check_size(folder / shard.name, shard)
    return [folder / shard.name for shard in split.shards], load_index(folder, parts.manifest, "train")


def _measure_models(
    parts: Preflight, training: list[Rates], validation: Rates
) -> tuple[list[Rates], Rates, str | None]:
    """The rates with those of the model, and a sentence where it could not be measured."""
    recipe, device = parts.recipe, parts.ranks.device
    statistics = normalization_statistics(recipe.data.normalization, parts.manifest.mean, parts.manifest.std)
    normalize = Normalize(*statistics, channels_last=recipe.model.channels_last).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about themselves
        # As fast, and nothing to download.
        untrained = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
        model = build_model(untrained, parts.manifest.num_classes).to(device)
    copies = recipe.checkpoint.keep_last + 1  # and `best`
    slots = 1 if recipe.optimizer.name == "sgd" else 2
    needed = num_parameters(model) * 4 * (1 + (1 + slots) * copies)
    free = size_in_words(free_bytes(recipe.run.folder))
    say("disk", f"checkpoints of about {size_in_words(needed)} in {recipe.run.folder}, where {free} are free")
    name = f"{recipe.model.name} {choose_precision(recipe.precision.mode, device)}"
    measured = []
    for rates in training:
        rate, fault = _model_rate(parts, model, normalize, rates.resolution, "training")
        if fault:
            return training, validation, fault
        say("model", f"{name}, {rates.resolution} px: {rate:,.0f} images/s")
        measured.append(replace(rates, model=rate))
    rate, fault = _model_rate(parts, model, normalize, validation.resolution, "validation")
    if fault:
        return measured, validation, fault
    say("model", f"{name}, {validation.resolution} px, validation: {rate:,.0f} images/s")
    return measured, replace(validation, model=rate), None


def _model_rate(
    parts: Preflight,
    model: nn.Module,
    normalize: Normalize,
    resolution: int,
    doing: Literal["training", "validation"],
) -> tuple[float, str | None]:
    recipe, device = parts.recipe, parts.ranks.device
    is_training = doing == "training"
    if is_training:
        batch_size = recipe.data.global_batch_size // (parts.ranks.world_size * recipe.data.accum_steps)
    else:
        batch_size = recipe.validation.batch_size

    def build(size: int) -> Any:
        if not is_training:
            return validation_step(recipe, model, normalize, resolution, size, device)
        num_classes = parts.manifest.num_classes
        return training_step(recipe, model, normalize, num_classes, resolution, size, device)

    try:
        return model_rate(build, batch_size, device, parts.seconds), None
    except torch.OutOfMemoryError:
        remedy = (
            f"data.grad_accum_steps={2 * recipe.data.accum_steps}"
            if is_training
            else f"validation.batch_size={max(1, batch_size // 2)}"
        )
        return 0.0, (
            f"{recipe.model.name} runs out of memory at {resolution} px in {doing} with {batch_size} images "
            f"at once on {_hardware(parts.ranks)}: try {remedy}"
        )
    except Exception as error:  # models raise all kinds for a size that they do not take
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        return 0.0, f"{recipe.model.name} failed at {resolution} px in {doing} ({reason})"


def _with_levers(parts: Preflight, figures: Figures) -> Figures:
    slowest = min(figures.training, key=lambda rates: rates.loader)
    print("  trying what would make loading faster …", flush=True)
    shards, index = _train_files(parts)
    content = [np.memmap(path, np.uint8, "r") for path in shards]
    rows = index[np.linspace(0, len(index) - 1, min(NUM_SAMPLES, len(index))).astype(int)]
    jpegs = [
        content[row["shard"]][int(row["offset"]) : int(row["offset"]) + int(row["length"])].tobytes()
        for row in rows
    ]
    largest = max(figures.training[-1].resolution, parts.recipe.validation_resolution)
    core_rate = slowest.loader / figures.cores_at_work
    levers = loader_levers(parts.backend, parts.training, slowest.resolution, slowest.loader, parts.seconds)
    levers += preparation_levers(jpegs, parts.manifest.images, largest, core_rate)
    for lever in levers:
        so = f", so loading about {lever.speedup:.1f} times as fast (estimated)" if lever.is_estimate else ""
        say("lever", f"{lever.change}: {lever.evidence}{so}")
    return replace(figures, levers=tuple(levers))
