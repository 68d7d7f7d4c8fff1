"""What the tests of interrupted starts share: a source, its calm results, looks into half-done folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.journal import FOLDER, _opened
from data_prep.verify import verify
from tests.integration.die_at import Ended, Nursery
from tests.unit.data_prep.test_tar_shards import write_noise_folder

FORMATS = ("dali", "ffcv")
NUM_IMAGES = {"train": 241, "val": 90}
NUM_PROBES = 200 + 90 + 90  # to plan the shards of train, and those of val by size


@dataclass
class Bench:
    """A source of 25 MB, a nursery for it, and the calm results by format: file name → SHA-256."""

    source: Path
    nursery: Nursery
    calm: dict[str, dict[str, str]]
    operations: dict[str, str]

    def words(self, out: Path, shard_format: str, *more: str) -> list[str]:
        source = ["--source", str(self.source), "--out", str(out)]
        return ["prepare", *source, "--format", shard_format, "--shard-mb", "1", *more]

    def start(self, out: Path, shard_format: str, *more: str, **how: Any) -> Ended:
        return self.nursery.start(*self.words(out, shard_format, *more), **how)


@contextlib.contextmanager
def open_bench(root: Path) -> Iterator[Bench]:
    """A bench below `root`."""
    source = write_noise_folder(root / "source", num_train=80, num_val=30)
    (source / "train" / "class_1" / "zz_bad.jpg").write_bytes(b"junk")
    with Nursery(source) as nursery:
        bench = Bench(source, nursery, {}, {})
        for shard_format in FORMATS:
            ended = bench.start(root / shard_format, shard_format)
            assert ended.status == 0, ended.text
            bench.calm[shard_format] = content_of(root / shard_format)
            bench.operations[shard_format] = ended.operations
            assert verify(root / shard_format, progress=False, num_workers=1)[1] == []
            shutil.rmtree(root / shard_format)
        yield bench


def content_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too; the lock apart, which stays."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def assert_calm(bench: Bench, out: Path, shard_format: str) -> None:
    assert content_of(out) == bench.calm[shard_format]
    assert not (out / FOLDER).exists()


def records(out: Path, split: str) -> list[dict[str, Any]]:
    paths = sorted((out / FOLDER).glob(f"{split}-*.json"))
    return [json.loads(_opened(path.read_bytes())) for path in paths]


def num_kept(out: Path, shard_format: str) -> int:
    """Images that the next start must keep, by what lies in the folder."""
    kept = 0
    for split, count in NUM_IMAGES.items():
        stops = [(record["start"], record["stop"]) for record in records(out, split)]
        if shard_format == "dali":
            kept += sum(stop - start for start, stop in stops)
            continue
        end = 0
        for start, stop in stops:
            if start == end and (stop < count or (out / f"{split}.beton").exists()):
                end = stop
        kept += end
    return kept
