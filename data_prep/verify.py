"""Does a prepared data set hold what its manifest says? Every file, checksum and image is looked at.

Works on a folder and on `s3://bucket/prefix`. Worker threads read runs of neighbouring samples, compare
their CRC-32C and decode them; meanwhile the files' SHA-256 are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from data_prep.manifest import (
    INDEX_DTYPE,
    QUARANTINE_NAME,
    FileEntry,
    Manifest,
    SplitEntry,
    load_manifest,
    read_index,
    read_keys,
)
from data_prep.normalize import Rejected, decode
from data_prep.progress import progress_bar
from data_prep.storage import Folder, crc32c, open_folder, sha256_of
from data_prep.workers import cores_of_this_rank
from data_prep.writers.beton import read_beton_tables

MAX_FAULTS = 20  # listed; a wholly broken file needs no million lines
RUN_BYTES = 8 << 20  # of samples that a worker reads at once


def verify(
    location: str | Path,
    decode: bool = True,
    num_samples: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[Manifest, list[str]]:
    """Check a data set against its manifest; returns the manifest and the faults found, a sentence each.

    Args:
        decode: decode images too (strictly), not only compare checksums.
        num_samples: look at only so many samples of each split, chosen by `seed`; None for all. The
            checksums of the files are compared in any case.

    Raises:
        ValueError: there is no readable manifest.
    """
    folder = open_folder(location)
    manifest = load_manifest(folder)
    faults: list[str] = []
    # Threads: decoding and checksums leave the interpreter's lock.
    pool = ThreadPoolExecutor(num_workers or cores_of_this_rank(), thread_name_prefix="verify")
    try:
        for split in manifest.splits:
            try:
                rows = _rows(folder, manifest, split, faults)
            except ValueError as error:
                faults.append(str(error))
                continue
            if num_samples is not None and num_samples < len(rows):
                chosen = np.random.default_rng(seed).choice(len(rows), num_samples, replace=False)
                ids = np.sort(chosen)
            else:
                ids = np.arange(len(rows))
            faults += _verify_split(folder, manifest.splits[split], split, rows, ids, decode, pool, progress)
            if len(faults) > MAX_FAULTS:
                break
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    faults += _verify_counts(folder, manifest)
    return manifest, faults[:MAX_FAULTS]


def _rows(folder: Folder, manifest: Manifest, split: str, faults: list[str]) -> np.ndarray:
    """The index of a split; adds what does not fit the manifest to `faults`."""
    entry = manifest.splits[split]  # type: ignore[index]
    index = read_index(folder, manifest, split)  # type: ignore[arg-type]
    if len(read_keys(folder, manifest, split)) != len(index):  # type: ignore[arg-type]
        faults.append(f"{folder.path_of(entry.keys.name)} has not one key a sample")
    if len(index) and (index["label"].min() < 0 or index["label"].max() >= manifest.num_classes):
        faults.append(f"split {split} has labels that are no class")
    elif np.bincount(index["label"], minlength=manifest.num_classes).tolist() != list(entry.class_counts):
        faults.append(f"the labels of split {split} do not add up to the manifest's class counts")
    if len(index) and index["shard"].max() >= len(entry.shards):
        raise ValueError(f"the index of split {split} names shards that are not in the manifest")
    return index


def _verify_split(
    folder: Folder,
    entry: SplitEntry,
    split: str,
    index: np.ndarray,
    ids: np.ndarray,
    decode: bool,
    pool: ThreadPoolExecutor,
    progress: bool,
) -> list[str]:
    faults: list[str] = []
    missing: set[int] = set()
    for number, shard in enumerate(entry.shards):
        fault = _size_fault(folder, shard)
        if fault is None and shard.name.endswith(".beton"):
            fault = beton_fault(folder, shard.name, index[index["shard"] == number])
        if fault:
            faults.append(fault)
            missing.add(number)
    ids = ids[~np.isin(index["shard"][ids], list(missing))]
    with (
        ThreadPoolExecutor(1, thread_name_prefix="sha256") as thread,
        progress_bar(len(ids), f"verify {split}", progress) as bar,
    ):
        sums = [thread.submit(_checksum_fault, folder, file) for file in entry.files]
        futures: dict[Future[list[str]], int] = {}
        try:
            futures = {
                pool.submit(
                    _verify_run, folder.path_of(entry.shards[shard].name), split, run, index[run], decode
                ): len(run)
                for shard, run in _runs(index, ids)
            }
            for future in as_completed(futures):
                bar.update(futures[future])
                faults += future.result()
                if len(faults) > MAX_FAULTS:
                    break
            faults += [fault for total in sums if (fault := total.result()) and fault not in faults]
        finally:
            for total in sums:
                total.cancel()
            for future in futures:
                future.cancel()
    return faults


def _runs(index: np.ndarray, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard, sample ids that lie close together), each run at most RUN_BYTES long or one sample."""
    ids = ids[np.lexsort((index["offset"][ids], index["shard"][ids]))]
    start = 0
    shards, offsets = index["shard"][ids], index["offset"][ids].astype(np.int64)
    ends = offsets + index["length"][ids]
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or shards[stop] != shards[start] or ends[stop] - offsets[start] > RUN_BYTES:
            yield int(shards[start]), ids[start:stop]
            start = stop


def _verify_run(path: str, split: str, ids: np.ndarray, rows: np.ndarray, decode: bool) -> list[str]:
    """In a worker thread: faults of neighbouring samples of the shard at `path`."""
    parent, _, name = path.rpartition("/")
    start = int(rows["offset"][0])
    length = int(rows["offset"][-1]) + int(rows["length"][-1]) - start
    content = memoryview(open_folder(parent or "/").read(name, start, length))
    faults = []
    for sample_id, row in zip(ids, rows, strict=True):
        offset = int(row["offset"]) - start
        fault = _sample_fault(bytes(content[offset : offset + int(row["length"])]), row, decode)
        if fault:
            faults.append(f"sample {sample_id} of split {split} {fault}")
    return faults[: MAX_FAULTS + 1]


def _size_fault(folder: Folder, file: FileEntry) -> str | None:
    info = folder.info(file.name)
    if info is None:
        return f"{folder.path_of(file.name)} is missing: copy it again, or prepare the data set again"
    if info.num_bytes != file.bytes:
        return (
            f"{folder.path_of(file.name)} has {info.num_bytes:,} bytes, its manifest says {file.bytes:,}: it "
            "was truncated or replaced; copy it again, or prepare the data set again"
        )
    return None


def _checksum_fault(folder: Folder, file: FileEntry) -> str | None:
    if fault := _size_fault(folder, file):
        return fault
    if sha256_of(folder, file.name, file.bytes) != file.sha256:
        return (
            f"{folder.path_of(file.name)} is not the file that was prepared (its SHA-256 differs): copy or "
            "prepare it again"
        )
    return None


def beton_fault(folder: Folder, name: str, rows: np.ndarray) -> str | None:
    """A sentence where FFCV's own tables say something else than the index (INDEX_DTYPE), or None.

    FFCV reads places and sizes from its tables, so wrong ones would give other images than the index names.
    """
    try:
        tables = read_beton_tables(folder, name)
    except ValueError as error:
        return str(error)
    image = tables.metadata["image"]
    theirs = np.zeros(len(tables.metadata), INDEX_DTYPE)
    for field, column in (
        ("offset", image["data_ptr"]),
        ("width", image["width"]),
        ("height", image["height"]),
        ("length", tables.allocations["size"]),
        ("label", tables.metadata["label"]),
    ):
        theirs[field] = column
        if len(theirs) != len(rows) or not np.array_equal(theirs[field], rows[field]):
            return (
                f"{folder.path_of(name)} and its sample index disagree about {field}: prepare the data set "
                "again"
            )
    return None


def _sample_fault(jpeg: bytes, row: np.void, decoded: bool) -> str | None:
    if crc32c(jpeg) != row["crc32c"]:
        return "is damaged (its CRC-32C differs)"
    if not decoded:
        return None
    try:
        shape = decode(jpeg).shape
    except Rejected as error:
        return f"cannot be decoded ({error})"
    return None if shape == (row["height"], row["width"], 3) else "has not the size that the index says"


def _verify_counts(folder: Folder, manifest: Manifest) -> list[str]:
    prepared = sum(split.num_samples for split in manifest.splits.values())
    faults = []
    if prepared + manifest.num_quarantined != manifest.num_found:
        faults.append(
            f"{manifest.num_found} files were found, but {prepared} are prepared and "
            f"{manifest.num_quarantined} quarantined"
        )
    if manifest.quarantine is not None and (fault := _checksum_fault(folder, manifest.quarantine)):
        return [*faults, fault]
    try:
        num_lines = folder.read(QUARANTINE_NAME).count(b"\n")
    except FileNotFoundError:
        num_lines = 0
    if num_lines != manifest.num_quarantined:
        faults.append(
            f"{folder.path_of(QUARANTINE_NAME)} lists {num_lines} files, the manifest says "
            f"{manifest.num_quarantined}"
        )
    return faults
