"""Source → workers → writer → commit.

Workers (processes) read and normalise; this process writes, in a seeded order, so that the result does not
depend on their number. What is finished is journaled in `.prepare/` beside the shards (see journal.py); the
manifest comes last. A new start after an interruption keeps what is finished (after checking it), does the
rest, and ends with the same bytes.

Memory: the listing of the source (about 0.3 KB an image) and, at the end of a split, its tables (0.5 KB an
image for a moment); finished images that wait for their turn (256 MiB), a few pieces of a shard (16 to 64 MiB
each), and in each worker one decoded image.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep import __version__
from data_prep.beton_work import write_beton
from data_prep.journal import Journal, Record
from data_prep.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    SPLITS,
    FileEntry,
    Manifest,
    SplitEntry,
    entry_of,
    load_manifest,
    save_manifest,
)
from data_prep.progress import progress_bar
from data_prep.ranks import (
    join,
    meet,
    publish_plan,
    say_stopped,
    still_led,
    take_plan,
    wait_for_records,
)
from data_prep.sources import Sample, Source
from data_prep.storage import Folder, LocalFolder, is_s3, open_folder, sha256_of
from data_prep.tar_work import Shard, plan_shards, write_tars
from data_prep.work import BadFiles, PrepareOptions, Work, order_of
from data_prep.workers import Workers

__all__ = ["PrepareOptions", "fingerprint_of", "prepare"]

OURS = r"(train|val)(-\d{5}\.(tar|idx)|\.beton|\.index\.npy|\.keys\.txt)"
OUR_FILES = re.compile(rf"{OURS}|\.{OURS}\.partial")
CLAIM = "claim"  # the note in the journal that says whose unfinished files these are


def prepare(source: Source, options: PrepareOptions) -> Manifest | None:
    """Write the data set of `source` to `options.out`, or find it there already.

    Returns the manifest; None on ranks other than 0.

    Raises:
        ValueError: the folder holds another data set, too many files are bad, or a class lost all of its
            images; the message says what to change, and nothing finished is deleted.
        RuntimeError: another process is writing there; the disk is full or S3 fails for good.
    """
    if options.world_size > 1 and options.format == "ffcv":
        if options.rank:
            raise SystemExit(1)  # rank 0 says why; once is enough
        raise ValueError(
            "one .beton a split cannot be divided among ranks: take --format dali, or start without torchrun"
        )
    folder = open_folder(options.out)
    _check_apart(source, folder)
    fingerprint = fingerprint_of(source, options)
    journal = Journal(folder, fingerprint, run=uuid.uuid4().hex)
    bad_files = BadFiles(len(source.samples), options.max_bad_fraction)
    if options.rank:
        join(journal, options.rank, options.world_size)
        with _told_to_others(journal, options):
            shards = _as_shards(take_plan(journal, options.rank))
            with Workers(options.num_workers, options.images) as workers:
                work = Work(folder, options, journal, workers, bad_files, still_led(journal))
                write_tars(work, shards[options.rank :: options.world_size], _orders(source, options))
        return None
    with folder.lock() as still_ours:
        with _told_to_others(journal, options):
            if options.world_size > 1:
                meet(journal, options.world_size)
            finished = _finished_manifest(folder, journal, options)
            if finished is None:
                _claim(folder, journal)
                with Workers(options.num_workers, options.images) as workers:
                    finished = _prepare(
                        Work(folder, options, journal, workers, bad_files, still_ours), source
                    )
            elif options.world_size > 1:
                publish_plan(journal, options.world_size, [])
        journal.clear()
    return finished


@contextlib.contextmanager
def _told_to_others(journal: Journal, options: PrepareOptions) -> Iterator[None]:
    """An error that ends this rank is made known, so that the others do not wait for it."""
    try:
        yield
    except (ValueError, RuntimeError, OSError):
        if options.world_size > 1:
            with contextlib.suppress(RuntimeError, OSError):  # the disk that is full, perhaps
                say_stopped(journal, options.rank)
        raise


def fingerprint_of(source: Source, options: PrepareOptions) -> str:
    """A digest of all that decides the result: files (key, version), labels, settings, tool version."""
    digest = hashlib.sha256()
    settings = options.images.model_dump_json()
    shape = f"{options.format}|{options.shard_bytes if options.format == 'dali' else ''}"
    digest.update(f"{__version__}|{source.layout}|{settings}|{options.seed}|{shape}|".encode())
    digest.update(repr((source.class_names, source.display_names)).encode())
    for sample in source.samples:
        line = f"{sample.split}|{sample.label}|{sample.key}|{sample.blob.version()}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _check_apart(source: Source, folder: Folder) -> None:
    """ValueError where the output would lie among the source's files, or replace its archives."""
    for blob in {_place_of(sample) for sample in source.samples}:
        if blob is None:
            continue
        inside = blob == folder.location if is_s3(blob) else False
        if not is_s3(blob) and isinstance(folder, LocalFolder):
            place, out = Path(blob).resolve(), folder.path.resolve()
            inside = place == out or place in out.parents
        if inside:
            raise ValueError(
                f"--out {folder.location} lies in the source {blob}: choose a folder outside of it"
            )


def _place_of(sample: Sample) -> str | None:
    """The folder that a sample's file, or the archive that holds it, lies in; None: it has no file."""
    root = getattr(sample.blob, "root", None)
    if root is not None:
        return str(root)
    location = getattr(sample.blob, "location", None)
    return None if location is None else str(location).rpartition("/")[0]


def _claim(folder: Folder, journal: Journal) -> None:
    """Mark the output as one of ours; ValueError where files of somebody else would be overwritten."""
    if journal.load_note(CLAIM):
        return
    foreign = [
        file.name
        for file in folder.children()
        if OUR_FILES.fullmatch(file.name) or file.name == QUARANTINE_NAME
    ]
    if foreign:
        raise ValueError(
            f"{folder.location} holds {foreign[0]}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}, "
            "which would be overwritten, and no manifest: choose another --out, or delete them"
        )
    journal.save_note(CLAIM, {"tool_version": __version__})


def _finished_manifest(folder: Folder, journal: Journal, options: PrepareOptions) -> Manifest | None:
    if folder.info(MANIFEST_NAME) is None:
        return None
    manifest = load_manifest(folder)
    if manifest.source_fingerprint != journal.fingerprint:
        raise ValueError(
            f"{folder.location} already holds a data set made from other files or settings: choose another "
            "--out, or delete that folder"
        )
    files = manifest.files
    with progress_bar(sum(file.bytes for file in files), "check", options.progress, unit="B") as bar:
        if all(_is_whole(folder, file, bar.update) for file in files):
            return manifest
    print(f"{folder.location} is damaged: preparing it again", file=sys.stderr)
    journal.save_note(CLAIM, {"tool_version": __version__})
    folder.delete(MANIFEST_NAME)
    return None


def _is_whole(folder: Folder, file: FileEntry, advance: Callable[[int], object]) -> bool:
    info = folder.info(file.name)
    if info is None or info.num_bytes != file.bytes:
        return False
    return sha256_of(folder, file.name, file.bytes, advance) == file.sha256


def _prepare(work: Work, source: Source) -> Manifest:
    orders = _orders(source, work.options)
    splits: dict[str, SplitEntry] = {}
    records: dict[str, list[Record]] = {}
    if work.options.format == "ffcv":
        for split, order in orders.items():
            records[split], file = write_beton(work, split, order)
            splits[split] = _commit_split(work.folder, split, order, records[split], (file,), (), source)
    else:
        shards = _planned_shards(work, orders)
        write_tars(work, shards[:: work.options.world_size], orders)
        expected = {split: sum(shard.split == split for shard in shards) for split in orders}
        wait_for_records(work.journal, expected, work.options.world_size)
        loaded_of = work.journal.load_all(orders)
        for split, order in orders.items():
            loaded = loaded_of[split]
            records[split] = [loaded[number] for number in range(expected[split])]
            tars, indexes = zip(*(record.files for record in records[split]), strict=True)
            splits[split] = _commit_split(work.folder, split, order, records[split], tars, indexes, source)
    work.still_ours()
    quarantined = [line for split in records.values() for record in split for line in record.quarantined]
    # Each rank has counted only its own.
    BadFiles(len(source.samples), work.options.max_bad_fraction).add(quarantined)
    content = "".join(json.dumps(line) + "\n" for line in quarantined).encode()
    work.folder.write(QUARANTINE_NAME, content)
    manifest = _build_manifest(work, source, splits, records, entry_of(QUARANTINE_NAME, content))
    # Before the manifest: where that is found, nobody looks for leftovers any more.
    _remove_leftovers(work.folder, manifest)
    save_manifest(work.folder, manifest)
    return manifest


def _orders(source: Source, options: PrepareOptions) -> dict[str, list[Sample]]:
    by_split = {name: [s for s in source.samples if s.split == name] for name in SPLITS}
    return {name: order_of(name, samples, options.seed) for name, samples in by_split.items() if samples}


def _planned_shards(work: Work, orders: dict[str, list[Sample]]) -> list[Shard]:
    """All shards of all splits, from the interrupted start's plan where there is one; tells other ranks."""
    fingerprint = work.journal.fingerprint
    plan = work.journal.load_note("plan")
    if plan.get("fingerprint") == fingerprint and plan.get("shards"):
        shards = _as_shards(plan["shards"])  # type: ignore[arg-type]
    else:
        shards = [shard for split, order in orders.items() for shard in plan_shards(work, split, order)]
    fields: list[list[object]] = [[shard.split, shard.number, shard.start, shard.stop] for shard in shards]
    publish_plan(work.journal, work.options.world_size, fields)
    return shards


def _as_shards(fields: list[list[object]]) -> list[Shard]:
    return [Shard(*shard) for shard in fields]  # type: ignore[arg-type]


def _commit_split(
    folder: Folder,
    split: str,
    order: Sequence[Sample],
    records: Sequence[Record],
    shards: Sequence[FileEntry],
    dali_indexes: Sequence[FileEntry],
    source: Source,
) -> SplitEntry:
    """Write the split's sample index and keys."""
    index = np.concatenate([record.index for record in records])
    bad = {line["key"] for record in records for line in record.quarantined}
    keys = [sample.key for sample in order if sample.key not in bad]
    counts = np.bincount(index["label"], minlength=len(source.class_names))
    if split == "train":
        _check_no_class_lost(counts.tolist(), source)
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    files = {
        f"{split}.index.npy": buffer.getvalue(),
        f"{split}.keys.txt": "".join(json.dumps(key) + "\n" for key in keys).encode(),
    }
    for name, content in files.items():
        folder.write(name, content)
    index_entry, keys_entry = (entry_of(name, content) for name, content in files.items())
    return SplitEntry(
        num_samples=len(index),
        class_counts=tuple(counts.tolist()),
        shards=tuple(shards),
        dali_indexes=tuple(dali_indexes),
        index=index_entry,
        keys=keys_entry,
    )


def _check_no_class_lost(counts: Sequence[int], source: Source) -> None:
    for name, count in zip(source.class_names, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"class {name!r} has no usable training image, all of them are broken: add images or remove "
                "the class"
            )


def _build_manifest(
    work: Work,
    source: Source,
    splits: dict[str, SplitEntry],
    records: dict[str, list[Record]],
    quarantine: FileEntry,
) -> Manifest:
    count = sum(record.num_statistics for record in records["train"])
    mean = np.sum([record.channel_sum for record in records["train"]], axis=0) / max(count, 1)
    square = np.sum([record.channel_square_sum for record in records["train"]], axis=0) / max(count, 1)
    # Never zero: a set of constant images must not divide by it later.
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
    lines = [line for split in records.values() for record in split for line in record.quarantined]
    reasons = Counter(line["reason"] for line in lines)
    prepared = sum(entry.num_samples for entry in splits.values())
    if prepared + reasons.total() != len(source.samples):
        raise RuntimeError(
            f"{len(source.samples)} files were found, but {prepared} prepared and {reasons.total()} "
            "quarantined: please report this"
        )
    return Manifest(
        format=work.options.format,
        layout=source.layout,
        class_names=source.class_names,
        display_names=source.display_names,
        splits=splits,  # type: ignore[arg-type]
        mean=tuple(mean.round(6).tolist()),
        std=tuple(std.round(6).tolist()),
        images=work.options.images,
        num_found=len(source.samples),
        num_quarantined=reasons.total(),
        quarantine=quarantine,
        quarantined_by_reason=dict(reasons.most_common()),
        source_fingerprint=work.journal.fingerprint,
        tool_version=__version__,
    )


def _remove_leftovers(folder: Folder, manifest: Manifest) -> None:
    """Shards of an earlier, interrupted start with other settings, which no manifest names."""
    named = {file.name for entry in manifest.splits.values() for file in entry.files}
    for file in folder.children():
        if OUR_FILES.fullmatch(file.name) and file.name not in named:
            folder.delete(file.name)
    for name, _ in folder.unfinished():
        if OUR_FILES.fullmatch(name):
            folder.abort_unfinished(name)
