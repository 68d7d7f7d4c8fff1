"""prepare from parquet, whose images are read a row group at a time: same bytes anyhow, few reads."""

from __future__ import annotations

import io
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from tests.integration.die_at import Nursery
from tests.integration.kill_bench import content_of, records
from tests.unit.data_prep.test_layouts import parquet

ROWS = {"train": 5000, "val": 1200}
ROWS_A_GROUP = 100  # as hubs have them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand tiny images, and a hundred of noise, so that there is more than one shard."""
    root = tmp_path_factory.mktemp("parquet")
    generator = np.random.default_rng(5)
    for split, count in ROWS.items():
        images: list[bytes | None] = []
        for number in range(count):
            side = 200 if number % 50 == 0 else 8
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).save(file, "JPEG")
            images.append(file.getvalue())
        labels: list[int | None] = [number % 7 for number in range(count)]
        (root / f"{split}.parquet").write_bytes(parquet(images, labels, rows_a_group=ROWS_A_GROUP))
    return root


@pytest.fixture(scope="module")
def calm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root, contents = tmp_path_factory.mktemp("calm"), {}
    for shard_format in ("dali", "ffcv"):
        prepare(open_source(source), options(root / shard_format, shard_format, num_workers=1))
        contents[shard_format] = content_of(root / shard_format)
    return contents


def options(out: Path, shard_format: str, **changes: Any) -> PrepareOptions:
    return PrepareOptions(out=out, format=shard_format, shard_bytes=1 << 20, progress=False, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shard_format", ["dali", "ffcv"])
def test_same_bytes_with_more_workers(
    source: Path, calm: dict[str, dict[str, str]], tmp_path: Path, shard_format: str
) -> None:
    prepare(open_source(source), options(tmp_path, shard_format, num_workers=3))
    assert content_of(tmp_path) == calm[shard_format]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nothing")) as nursery:
        yield nursery


@pytest.mark.parametrize("shard_format", ["dali", "ffcv"])
def test_same_bytes_after_kills(
    source: Path, calm: dict[str, dict[str, str]], nursery: Nursery, tmp_path: Path, shard_format: str
) -> None:
    words = ["prepare", "--source", str(source), "--out", str(tmp_path), "--format", shard_format]
    for point in (26, 14):
        ended = nursery.start(*words, "--shard-mb", "1", point=point)
        assert ended.status == -signal.SIGKILL, ended.text
    assert records(tmp_path, "train")
    ended = nursery.start(*words, "--shard-mb", "1")
    assert ended.status == 0 and ended.num_normalized < sum(ROWS.values())
    assert content_of(tmp_path) == calm[shard_format]


@pytest.mark.parametrize("shard_format", ["dali", "ffcv"])
def test_row_groups_are_read_about_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_format: str
) -> None:
    reads: Counter[tuple[int, int]] = Counter()
    original = pyarrow.parquet.ParquetFile.read_row_group

    def counting(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        if named.get("columns") == ["image.bytes"]:
            reads[self.metadata.num_rows, number] += 1
        return original(self, number, *arguments, **named)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counting)
    listed = open_source(source)
    reads.clear()
    # One worker, a thread of this process: each keeps the last row group.
    prepare(listed, options(tmp_path, shard_format, num_workers=1))
    assert len(reads) == sum(ROWS.values()) // ROWS_A_GROUP
    # To plan tars, some images are encoded before.
    allowed = 1.1 if shard_format == "ffcv" else 2.5
    assert reads.total() <= allowed * len(reads), reads
