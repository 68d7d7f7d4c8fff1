"""The splits as WebDataset tars for DALI; each tar is journaled when it is finished.

Which samples go into which tar is planned before, so that several ranks can divide the tars among them and
write the same bytes as one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.journal import Record, RecordBuilder
from data_prep.manifest import entry_of
from data_prep.normalize import NormalizedImage
from data_prep.progress import progress_bar
from data_prep.sources import Sample
from data_prep.storage import sha256_of
from data_prep.work import Work
from data_prep.workers import Job
from data_prep.writers.stream import StreamWriter
from data_prep.writers.tar import TarWriter, sample_bytes

NUM_PROBES = 200  # images that are encoded to learn how many fit a tar
PROBES_A_SHARD = 16
MAX_SHARDS = 65535  # the index's column has 16 bits


@dataclass(frozen=True)
class Shard:
    """A tar to write: samples `start` to `stop` of a split's order."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"


def plan_shards(work: Work, split: str, order: Sequence[Sample]) -> list[Shard]:
    """Divide a split into tars of about `shard_bytes` each: all within half and double of it.

    Some images are encoded for it, evenly spaced. A shuffled split is divided by count; one in the source's
    order by the sizes that they foretell, since its classes may differ.
    """
    sizes = _probe(work, order, NUM_PROBES)
    target = work.options.shard_bytes
    num_shards = max(1, round(float(sizes.mean()) * len(order) / target))
    if num_shards > MAX_SHARDS:
        raise ValueError(f"split {split} would have {num_shards:,} shards: choose a larger --shard-mb")
    if split != "train" and num_shards > 1:
        sizes = _probe(work, order, max(NUM_PROBES, PROBES_A_SHARD * num_shards))
        places = np.linspace(0, len(order), len(sizes) + 1)
        filled = np.concatenate([[0.0], np.cumsum(sizes)])
        borders = np.interp(np.linspace(0, filled[-1], num_shards + 1), filled, places)
    else:
        borders = np.linspace(0, len(order), num_shards + 1)
    edges = [round(float(border)) for border in borders]
    return [
        Shard(split, number, start, stop) for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]


def _probe(work: Work, order: Sequence[Sample], count: int) -> np.ndarray:
    """Bytes in a tar of evenly spaced samples; a bad one takes none."""
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    images = work.workers.normalized(Job(order[place], False) for place in places)
    sizes = [sample_bytes(len(i.jpeg)) if isinstance(i, NormalizedImage) else 0 for i in images]
    return np.maximum(np.array(sizes, dtype=np.float64), 1)


def write_tars(work: Work, shards: Sequence[Shard], orders: dict[str, list[Sample]]) -> None:
    """Write those shards that are not there whole already; each leaves its record in the journal."""
    known = {split: work.journal.load(split) for split in orders}
    missing, num_kept = [], 0
    for shard in shards:
        record = known[shard.split].get(shard.number)
        if record is not None and _is_whole(work, shard, record):
            work.bad_files.add(record.quarantined)
            if record.run != work.journal.run:
                work.journal.save(shard.split, record.model_copy(update={"run": work.journal.run}))
            num_kept += 1
        else:
            missing.append(shard)
    share = f" (rank 0's share of {work.options.world_size})" if work.options.world_size > 1 else ""
    if num_kept and work.options.rank == 0:
        print(f"{num_kept} of {len(shards)} shards kept from the interrupted run{share}", file=sys.stderr)
    total = sum(shard.stop - shard.start for shard in missing)
    with progress_bar(total, f"prepare{share}", work.options.progress) as bar:
        # One stream over all shards: the workers do not pause at a border.
        ranges = [(shard.split, shard.start, shard.stop) for shard in missing]
        results = work.normalized(ranges, orders)
        for shard in missing:
            work.still_ours()
            _write_tar(work, shard, results, bar)


def _write_tar(
    work: Work, shard: Shard, results: Iterator[tuple[int, Sample, NormalizedImage | str]], bar: tqdm[Any]
) -> None:
    builder = RecordBuilder(shard.split, shard.start)
    with StreamWriter(work.folder, shard.name) as stream:
        tar = TarWriter(stream)
        for _ in range(shard.stop - shard.start):
            position, sample, result = next(results)
            bar.update()
            if isinstance(result, str):
                builder.reject(sample.key, result)
                work.bad_files.add(builder.quarantined[-1:])
                continue
            offset = tar.add(f"{position:09d}", result.jpeg, sample.label)
            builder.add(result, offset, sample.label, shard.number)
        index_text = tar.close()
        entry = stream.finish()
    index_name = shard.name.removesuffix(".tar") + ".idx"
    content = index_text.encode()
    work.folder.write(index_name, content)
    files = (entry, entry_of(index_name, content))
    journal = work.journal
    journal.save(shard.split, builder.build(journal.fingerprint, journal.run, shard.number, files=files))


def _is_whole(work: Work, shard: Shard, record: Record) -> bool:
    if (record.start, record.stop) != (shard.start, shard.stop) or len(record.files) != 2:
        return False
    for file in record.files:
        info = work.folder.info(file.name)
        if info is None or info.num_bytes != file.bytes:
            return False
        if sha256_of(work.folder, file.name, file.bytes) != file.sha256:
            return False
    return True
