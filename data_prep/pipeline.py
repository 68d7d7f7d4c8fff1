"""Source → workers → writer → commit.

Workers (processes) read and normalise; this process writes, in a seeded order, so that the result does not
depend on their number. A split is committed when its shard, index and keys are on the disk under their
final names; the manifest comes last. A new start after an interruption keeps committed splits (verified by
SHA-256) and does the others again.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep import __version__
from data_prep.manifest import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    FileEntry,
    ImageSettings,
    Manifest,
    SplitEntry,
    load_manifest,
    save_manifest,
)
from data_prep.normalize import NormalizedImage, Rejected, normalize
from data_prep.progress import progress_bar
from data_prep.sources import Sample, Source
from data_prep.storage import LocalFolder, crc32c, exclusive_lock, sha256_file, sync_folder, write_atomically
from data_prep.writers.beton import BetonWriter

SAMPLES_PER_TASK = 16  # enough to hide the cost of passing a task, few enough to keep the bar moving
TASKS_IN_FLIGHT = 4  # a worker; bounds the memory: what is finished early waits for its turn


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is told; see `python -m data_prep prepare --help`."""

    out: Path
    images: ImageSettings = field(default_factory=ImageSettings)
    seed: int = 0
    num_workers: int = 0  # 0: one a core
    max_bad_fraction: float = 0.05
    progress: bool = True


class _CommittedSplit(BaseModel):
    """A finished split, remembered in `.prepare-state.json` until the manifest stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: SplitEntry
    channel_sum: tuple[float, float, float]
    channel_square_sum: tuple[float, float, float]
    quarantined: list[dict[str, str]]


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    splits: dict[str, _CommittedSplit] = {}


def prepare(source: Source, options: PrepareOptions) -> Manifest:
    """Write the data set of `source` into `options.out`, or find it there already.

    Raises:
        ValueError: the folder holds another data set, too many files are bad, or a class lost all of its
            images; the message says what to change, and nothing finished is deleted.
        RuntimeError: another process is writing there.
    """
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    fingerprint = fingerprint_of(source, options)
    with exclusive_lock(out):
        finished = _finished_manifest(out, fingerprint)
        if finished is not None:
            return finished
        state = _load_state(out, fingerprint)
        for split in ("train", "val"):
            samples = [sample for sample in source.samples if sample.split == split]
            if split not in state.splits and samples:
                # One allowance for the whole source.
                num_bad = sum(len(done.quarantined) for done in state.splits.values())
                allowed = math.ceil(options.max_bad_fraction * len(source.samples)) - num_bad
                state.splits[split] = _prepare_split(split, samples, source, options, allowed)
                write_atomically(out / ".prepare-state.json", state.model_dump_json().encode())
        manifest = _build_manifest(source, options, state)
        quarantined = [line for split in state.splits.values() for line in split.quarantined]
        lines = "".join(json.dumps(line) + "\n" for line in quarantined)
        write_atomically(out / QUARANTINE_NAME, lines.encode())
        save_manifest(LocalFolder(out), manifest)
        (out / ".prepare-state.json").unlink(missing_ok=True)
    return manifest


def fingerprint_of(source: Source, options: PrepareOptions) -> str:
    """A digest of everything that decides the result: files (key, size, time), labels, settings, version."""
    digest = hashlib.sha256()
    settings = options.images.model_dump_json()
    digest.update(f"{__version__}|{source.layout}|{settings}|{options.seed}|{source.class_names}".encode())
    for sample in source.samples:
        line = f"{sample.split}|{sample.label}|{sample.key}|{sample.blob.version()}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _finished_manifest(out: Path, fingerprint: str) -> Manifest | None:
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = load_manifest(out)
    if manifest.source_fingerprint != fingerprint:
        raise ValueError(
            f"{out} already holds a data set made from other files or settings: choose another --out, or "
            "delete that folder"
        )
    if all(_is_whole(out, entry) for entry in manifest.splits.values()):
        return manifest
    print(f"{out} is damaged: preparing it again", file=sys.stderr)
    (out / MANIFEST_NAME).unlink()
    return None


def _is_whole(out: Path, entry: SplitEntry) -> bool:
    files = (*entry.shards, entry.index, entry.keys)
    return all((out / f.name).is_file() and sha256_file(out / f.name) == f.sha256 for f in files)


def _load_state(out: Path, fingerprint: str) -> _State:
    """Splits that an interrupted run committed, as far as they fit these settings and are undamaged."""
    empty = _State(fingerprint=fingerprint)
    try:
        state = _State.model_validate_json((out / ".prepare-state.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return empty
    if state.fingerprint != fingerprint:
        return empty
    for name, split in list(state.splits.items()):
        if _is_whole(out, split.entry):
            print(f"split {name}: kept from the interrupted run", file=sys.stderr)
        else:
            del state.splits[name]
    return state


def _prepare_split(
    split: str, samples: list[Sample], source: Source, options: PrepareOptions, allowed: int
) -> _CommittedSplit:
    """Write one split; more than `allowed` bad files end it, so that a hopeless source ends soon."""
    if split == "train":
        # A seeded random order on the disk: a reader that goes through the file in order sees mixed classes.
        order = np.random.default_rng([options.seed, 0]).permutation(len(samples))
        samples = [samples[position] for position in order]
    index = np.zeros(len(samples), INDEX_DTYPE)
    keys: list[str] = []
    quarantined: list[dict[str, str]] = []
    sums = np.zeros((2, 3))
    partial = options.out / f".{split}.beton.partial"
    with (
        BetonWriter(partial, capacity=len(samples)) as writer,
        progress_bar(len(samples), f"prepare {split}", options.progress) as bar,
    ):
        for sample, result in _normalized(samples, options):
            bar.update()
            if isinstance(result, NormalizedImage) and len(result.jpeg) > writer.page_bytes:
                result = f"stored image larger than {writer.page_bytes >> 20} MiB: set --resolution-cap"
            if isinstance(result, str):
                quarantined.append({"split": split, "key": sample.key, "reason": result})
                if len(quarantined) > allowed:
                    raise ValueError(_too_many_bad(quarantined, options))
                continue
            offset = writer.add(result.jpeg, result.width, result.height, sample.label)
            row = (len(result.jpeg), crc32c(result.jpeg), sample.label, 0, result.width, result.height)
            index[len(keys)] = (offset, *row)
            keys.append(sample.key)
            sums += (result.channel_mean, result.channel_square_mean)
    index = index[: len(keys)]
    entry = _commit_split(split, partial, index, keys, len(source.class_names), options.out)
    _check_no_class_lost(split, entry, source)
    total, squares = (tuple(row.tolist()) for row in sums)
    return _CommittedSplit(
        entry=entry, channel_sum=total, channel_square_sum=squares, quarantined=quarantined
    )


def _commit_split(
    split: str, partial: Path, index: np.ndarray, keys: list[str], num_classes: int, out: Path
) -> SplitEntry:
    shard, index_path, keys_path = (
        out / f"{split}.beton",
        out / f"{split}.index.npy",
        out / f"{split}.keys.txt",
    )
    partial.replace(shard)
    index_partial = out / f".{split}.index.partial.npy"
    np.save(index_partial, index, allow_pickle=False)
    index_partial.replace(index_path)
    # surrogateescape: a file name that is no UTF-8 must not end the job.
    lines = "".join(json.dumps(key) + "\n" for key in keys)
    write_atomically(keys_path, lines.encode())
    sync_folder(out)
    counts = np.bincount(index["label"], minlength=num_classes)
    return SplitEntry(
        num_samples=len(index),
        class_counts=tuple(counts.tolist()),
        shards=(FileEntry.of(shard),),
        index=FileEntry.of(index_path),
        keys=FileEntry.of(keys_path),
    )


def _check_no_class_lost(split: str, entry: SplitEntry, source: Source) -> None:
    if split != "train":
        return
    for name, count in zip(source.class_names, entry.class_counts, strict=True):
        if count == 0:
            raise ValueError(
                f"class {name!r} has no usable training image, all of them are broken: add images or remove "
                "the class"
            )


def _too_many_bad(quarantined: list[dict[str, str]], options: PrepareOptions) -> str:
    reasons = Counter(line["reason"] for line in quarantined).most_common(3)
    listing = "; ".join(f"{count} × {reason}" for reason, count in reasons)
    return (
        f"too many files cannot be used (--max-bad-fraction {options.max_bad_fraction}): {listing}"
        f"; the last was {quarantined[-1]['key']!r}. Mend the source, or allow more"
    )


def _normalized(
    samples: list[Sample], options: PrepareOptions
) -> Iterator[tuple[Sample, NormalizedImage | str]]:
    """Each sample with its image, or with the reason why there is none; in the order given."""
    tasks = [samples[i : i + SAMPLES_PER_TASK] for i in range(0, len(samples), SAMPLES_PER_TASK)]
    num_workers = min(options.num_workers or len(os.sched_getaffinity(0)), len(tasks))
    pool = ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("forkserver"), initializer=_begin_worker
    )
    pending: deque[tuple[list[Sample], Future]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(_normalize_task, task, options.images)))
            if len(pending) > TASKS_IN_FLIGHT * num_workers:
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in pending:
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, most likely for memory: start again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    # Ctrl-C reaches the whole process group; only the parent shall act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when the main process is gone, however it died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _normalize_task(samples: list[Sample], settings: ImageSettings) -> list[NormalizedImage | str]:
    results: list[NormalizedImage | str] = []
    for sample in samples:
        try:
            results.append(normalize(sample.read(), settings))
        except Rejected as error:
            results.append(str(error))
        except OSError as error:
            results.append(f"cannot be read: {error.strerror}")
        except ValueError as error:  # a blob's own reason
            results.append(str(error))
    return results


def _build_manifest(source: Source, options: PrepareOptions, state: _State) -> Manifest:
    train = state.splits["train"]
    count = train.entry.num_samples
    mean = np.array(train.channel_sum) / count
    variance = np.maximum(np.array(train.channel_square_sum) / count - mean**2, 0)
    # Never zero: a set of constant images must not divide by it later.
    std = np.maximum(np.sqrt(variance), 1 / 255)
    reasons = Counter(line["reason"] for split in state.splits.values() for line in split.quarantined)
    prepared = sum(split.entry.num_samples for split in state.splits.values())
    if prepared + reasons.total() != len(source.samples):
        raise RuntimeError(
            f"{len(source.samples)} files were found, but {prepared} prepared and {reasons.total()} "
            "quarantined: please report this"
        )
    return Manifest(
        layout=source.layout,
        class_names=source.class_names,
        splits={name: split.entry for name, split in state.splits.items()},  # type: ignore[misc]
        mean=tuple(mean.round(6).tolist()),
        std=tuple(std.round(6).tolist()),
        images=options.images,
        num_found=len(source.samples),
        num_quarantined=reasons.total(),
        quarantined_by_reason=dict(reasons.most_common()),
        source_fingerprint=state.fingerprint,
        tool_version=__version__,
    )
