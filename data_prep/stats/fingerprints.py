"""What the audit remembers of every image: a digest, a perceptual hash, a small thumbnail, its contrast.

Worker processes read the shards in long ranges (one request for many samples, which matters on S3), check the
checksums and decode at reduced size; they return 0.8 kB a sample.

Source of the hash: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), as in
the `imagehash` package: the signs of the 64 lowest frequencies of the 32×32 grey image about their median.

Example:
    >>> prints, faults = fingerprint(open_data_set("data/intel"), "val", num_workers=2)
    >>> prints["hash"].dtype, prints["thumbnail"].shape
    (dtype('uint64'), (1800, 16, 16, 3))
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from data_prep.progress import progress_bar
from data_prep.stats.samples import DataSet, Split, read_shard
from data_prep.storage import crc32c, open_folder
from data_prep.workers import build_pool

THUMBNAIL_SIDE = 16
DECODED_SIDE = 128  # pixels of the shorter side at least (where the image has them); the hash needs 32
SAMPLES_PER_TASK = 64
RANGE_BYTES = 8 << 20  # read at once
TASKS_IN_FLIGHT = 3  # a worker

FINGERPRINT_DTYPE = np.dtype(
    [
        ("is_read", "?"),  # False: damaged, nothing else is set
        (
            "digest",
            "<u8",
        ),  # BLAKE2b of the stored bytes; two of 1.28 million collide by chance in 4 of 10⁸ sets
        ("hash", "<u8"),
        ("std", "<f4"),  # of the channel that varies most, grey levels of 255
        ("thumbnail", "u1", (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)),
    ]
)


@dataclass(frozen=True)
class _Task:
    """Samples that lie close together in one shard: ids, int64 (n,), and their rows of INDEX_DTYPE, (n,)."""

    location: str
    shard: str
    sample_ids: np.ndarray
    rows: np.ndarray


def fingerprint(
    data_set: DataSet, split: Split, num_workers: int = 0, progress: bool = True
) -> tuple[np.ndarray, dict[int, str]]:
    """Fingerprints of a split, FINGERPRINT_DTYPE (num_samples,), and the faults by sample id.

    Args:
        num_workers: processes; 0 for one a core, 1 for this one.

    Raises:
        ValueError: a shard is missing.
        RuntimeError: a worker was killed.
    """
    tasks = _tasks(data_set, split)
    prints = np.zeros(len(data_set.splits[split].index), FINGERPRINT_DTYPE)
    faults: dict[int, str] = {}
    with progress_bar(len(prints), f"audit {split}", progress) as bar:
        for task, (part, part_faults) in _in_workers(tasks, num_workers or len(os.sched_getaffinity(0))):
            prints[task.sample_ids] = part
            faults |= part_faults
            bar.update(len(part))
    return prints, dict(sorted(faults.items()))


def _tasks(data_set: DataSet, split: Split) -> list[_Task]:
    samples = data_set.splits[split]
    index = samples.index
    order = np.lexsort((index["offset"], index["shard"]))
    tasks: list[_Task] = []
    start = 0
    for position in range(1, len(order) + 1):
        if position < len(order) and position - start < SAMPLES_PER_TASK:
            first, last = index[order[start]], index[order[position]]
            end = int(last["offset"]) + int(last["length"])
            if first["shard"] == last["shard"] and end - int(first["offset"]) <= RANGE_BYTES:
                continue
        ids = order[start:position]
        shard = samples.entry.shards[int(index["shard"][ids[0]])].name
        tasks.append(_Task(data_set.location, shard, ids, np.array(index[ids])))
        start = position
    return tasks


def _in_workers(
    tasks: list[_Task], num_workers: int
) -> Iterator[tuple[_Task, tuple[np.ndarray, dict[int, str]]]]:
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        yield from ((task, _fingerprint_task(task)) for task in tasks)
        return
    pool = build_pool(num_workers)
    pending: deque[tuple[_Task, Future]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(_fingerprint_task, task)))
            if len(pending) > TASKS_IN_FLIGHT * num_workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, most likely for memory: start again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fingerprint_task(task: _Task) -> tuple[np.ndarray, dict[int, str]]:
    rows = task.rows
    start = int(rows["offset"][0])
    end = int((rows["offset"] + rows["length"]).max())
    content = memoryview(read_shard(open_folder(task.location), task.shard, start, end - start))
    prints = np.zeros(len(rows), FINGERPRINT_DTYPE)
    faults: dict[int, str] = {}
    for position, row in enumerate(rows):
        offset = int(row["offset"]) - start
        jpeg = content[offset : offset + int(row["length"])].tobytes()
        try:
            prints[position] = fingerprint_image(jpeg, int(row["crc32c"]))
        except ValueError as error:
            faults[int(task.sample_ids[position])] = str(error)
    return prints, faults


def fingerprint_image(jpeg: bytes, checksum: int) -> tuple:
    """One row of FINGERPRINT_DTYPE. ValueError: the reason why it cannot be read."""
    import imagehash
    import simplejpeg
    from PIL import Image

    if crc32c(jpeg) != checksum:
        raise ValueError("is damaged (its CRC-32C differs)")
    try:
        pixels = simplejpeg.decode_jpeg(jpeg, fastdct=True, min_height=DECODED_SIDE, min_width=DECODED_SIDE)
    except ValueError as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    image = Image.fromarray(pixels)
    bits = np.packbits(imagehash.phash(image).hash)
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return (
        True,
        int.from_bytes(hashlib.blake2b(jpeg, digest_size=8).digest(), "little"),
        int.from_bytes(bits.tobytes(), "big"),
        float(pixels.std(axis=(0, 1), dtype=np.float32).max()),
        np.asarray(image.resize(side, Image.Resampling.BOX)),
    )
