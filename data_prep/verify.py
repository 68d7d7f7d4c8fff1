"""Does a prepared data set hold what its manifest says? Every file, checksum and image is looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

from data_prep.manifest import (
    INDEX_DTYPE,
    QUARANTINE_NAME,
    FileEntry,
    Manifest,
    check_size,
    load_index,
    load_keys,
    load_manifest,
)
from data_prep.progress import progress_bar
from data_prep.storage import crc32c, sha256_file
from data_prep.writers.beton import read_beton_tables

MAX_FAULTS = 20  # listed; a wholly broken file needs no million lines


def verify(folder: Path, decode: bool = True, progress: bool = True) -> tuple[Manifest, list[str]]:
    """Check `folder` against its manifest; returns the manifest and the faults found, a sentence each.

    Args:
        decode: decode every image too (strictly), not only compare checksums.

    Raises:
        ValueError: there is no readable manifest.
    """
    manifest = load_manifest(folder)
    faults: list[str] = []
    for split in manifest.splits:
        try:
            faults += _verify_split(folder, manifest, split, decode, progress)
        except ValueError as error:
            faults.append(str(error))
        if len(faults) > MAX_FAULTS:
            break
    faults += _verify_counts(folder, manifest)
    return manifest, faults[:MAX_FAULTS]


def _verify_split(folder: Path, manifest: Manifest, split: str, decode: bool, progress: bool) -> list[str]:
    entry = manifest.splits[split]  # type: ignore[index]
    faults = [
        fault
        for file in (entry.index, entry.keys, *entry.shards)
        if (fault := _checksum_fault(folder, file)) is not None
    ]
    index = load_index(folder, manifest, split)  # type: ignore[arg-type]
    if len(load_keys(folder, manifest, split)) != len(index):  # type: ignore[arg-type]
        faults.append(f"{folder / entry.keys.name} has not one key a sample")
    if np.bincount(index["label"], minlength=manifest.num_classes).tolist() != list(entry.class_counts):
        faults.append(f"the labels of split {split} do not add up to the manifest's class counts")
    for shard_number, shard in enumerate(entry.shards):
        rows = index[index["shard"] == shard_number]
        if fault := beton_fault(folder / shard.name, rows):
            faults.append(fault)
        faults += _verify_samples(folder / shard.name, rows, split, decode, progress)
    return faults


def _checksum_fault(folder: Path, file: FileEntry) -> str | None:
    path = folder / file.name
    check_size(path, file)
    if sha256_file(path) != file.sha256:
        return f"{path} is not the file that was prepared (its SHA-256 differs): copy or prepare it again"
    return None


def beton_fault(path: Path, rows: np.ndarray) -> str | None:
    """A sentence where FFCV's own tables say something else than the index (INDEX_DTYPE), or None.

    FFCV reads places and sizes from its tables, so wrong ones would give other images than the index names.
    """
    tables = read_beton_tables(path)
    image = tables.metadata["image"]
    theirs = np.zeros(len(tables.metadata), INDEX_DTYPE)
    for name, column in (
        ("offset", image["data_ptr"]),
        ("width", image["width"]),
        ("height", image["height"]),
        ("length", tables.allocations["size"]),
        ("label", tables.metadata["label"]),
    ):
        theirs[name] = column
        if len(theirs) != len(rows) or not np.array_equal(theirs[name], rows[name]):
            return f"{path} and its sample index disagree about {name}: prepare the data set again"
    return None


def _verify_samples(path: Path, rows: np.ndarray, split: str, decode: bool, progress: bool) -> list[str]:
    faults: list[str] = []
    content = np.memmap(path, np.uint8, "r")
    with progress_bar(len(rows), f"verify {split}", progress) as bar:
        for sample_id, row in enumerate(rows):
            jpeg = content[int(row["offset"]) : int(row["offset"]) + int(row["length"])].tobytes()
            if fault := _sample_fault(jpeg, row, decode):
                faults.append(f"sample {sample_id} of split {split} {fault}")
                if len(faults) > MAX_FAULTS:
                    break
            bar.update()
    return faults


def _sample_fault(jpeg: bytes, row: np.void, decode: bool) -> str | None:
    if crc32c(jpeg) != row["crc32c"]:
        return "is damaged (its CRC-32C differs)"
    if not decode:
        return None
    try:
        shape = simplejpeg.decode_jpeg(jpeg, strict=True).shape
    except ValueError as error:
        return f"cannot be decoded ({error})"
    return None if shape == (row["height"], row["width"], 3) else "has not the size that the index says"


def _verify_counts(folder: Path, manifest: Manifest) -> list[str]:
    prepared = sum(split.num_samples for split in manifest.splits.values())
    faults = []
    if prepared + manifest.num_quarantined != manifest.num_found:
        faults.append(
            f"{manifest.num_found} files were found, but {prepared} are prepared and "
            f"{manifest.num_quarantined} quarantined"
        )
    path = folder / QUARANTINE_NAME
    num_lines = path.read_bytes().count(b"\n") if path.is_file() else 0
    if num_lines != manifest.num_quarantined:
        faults.append(f"{path} lists {num_lines} files, the manifest says {manifest.num_quarantined}")
    return faults
