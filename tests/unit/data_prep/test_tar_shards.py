"""The dali format: tars that webdataset and DALI read, planned sizes, an index that agrees."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_prep.manifest import Manifest, load_index, load_keys
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from data_prep.storage import crc32c
from data_prep.verify import verify
from tests.conftest import write_image_folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Noise of some 80 KB an image, in shards of about 0.6 MB: 3 classes, 30 train and 24 val images."""
    root = tmp_path_factory.mktemp("tars")
    source = write_noise_folder(root / "source", num_train=10, num_val=8)
    (source / "train" / "class_1" / "zz_bad.jpg").write_bytes(b"junk")
    options = PrepareOptions(
        out=root / "out", format="dali", num_workers=2, shard_bytes=600_000, progress=False
    )
    manifest = prepare(open_source(source), options)
    assert manifest is not None
    return root / "out", manifest


def write_noise_folder(root: Path, num_train: int, num_val: int, side: int = 300) -> Path:
    """Noise does not compress: large files from few images. Validation images grow from class to class."""
    generator = np.random.default_rng(1)
    for split, count in (("train", num_train), ("val", num_val)):
        for label in range(3):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            size = side if split == "train" else side // 2 + side // 4 * label
            for number in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                (folder / f"{number:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=95))
    return root


def test_index_names_every_image(tars: tuple[Path, Manifest]) -> None:
    folder, manifest = tars
    assert manifest.format == "dali" and manifest.num_quarantined == 1
    for split in ("train", "val"):
        entry = manifest.splits[split]  # type: ignore[index]
        contents = [(folder / shard.name).read_bytes() for shard in entry.shards]
        index = load_index(folder, manifest, split)  # type: ignore[arg-type]
        keys = load_keys(folder, manifest, split)  # type: ignore[arg-type]
        assert len(index) == len(keys) == (30 if split == "train" else 24)
        for row, key in zip(index, keys, strict=True):
            start = int(row["offset"])
            jpeg = contents[row["shard"]][start : start + int(row["length"])]
            assert crc32c(jpeg) == row["crc32c"] and f"class_{row['label']}" in key
    assert verify(folder, progress=False)[1] == []


def test_shards_are_about_as_large_as_asked(tars: tuple[Path, Manifest]) -> None:
    for entry in tars[1].splits.values():
        sizes = [shard.bytes for shard in entry.shards]
        assert len(sizes) > 1 and all(300_000 <= size <= 1_200_000 for size in sizes), sizes


def test_idx_is_what_dalis_own_tool_writes(tars: tuple[Path, Manifest], tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    folder, manifest = tars
    tool = shutil.which("wds2idx", path=str(Path(sys.executable).parent))
    assert tool is not None
    for entry in manifest.splits.values():
        for shard, ours in zip(entry.shards, entry.dali_indexes, strict=True):
            theirs = tmp_path / ours.name
            subprocess.run([tool, str(folder / shard.name), str(theirs)], check=True, capture_output=True)
            assert (folder / ours.name).read_text() == theirs.read_text().rstrip() + "\n"


def test_dali_reads_all_samples_with_their_labels(tars: tuple[Path, Manifest]) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    folder, manifest = tars
    entry = manifest.splits["train"]
    index = load_index(folder, manifest, "train")

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():  # type: ignore[no-untyped-def]
        jpegs, labels = fn.readers.webdataset(
            paths=[str(folder / shard.name) for shard in entry.shards],
            index_paths=[str(folder / file.name) for file in entry.dali_indexes],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return jpegs, labels, fn.decoders.image(jpegs, device="cpu")

    pipe = pipeline()
    pipe.build()
    assert pipe.epoch_size("reader") == len(index)
    for row in index:
        jpeg, label, pixels = (output.as_array()[0] for output in pipe.run())
        assert crc32c(jpeg.tobytes()) == row["crc32c"]
        assert int(label.tobytes()) == row["label"]
        assert pixels.shape == (row["height"], row["width"], 3)


def test_webdataset_reads_all_samples_with_their_labels(tars: tuple[Path, Manifest]) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder, manifest = tars
    index = load_index(folder, manifest, "val")
    paths = [str(folder / shard.name) for shard in manifest.splits["val"].shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(samples) == len(index)
    for sample, row in zip(samples, index, strict=True):
        assert crc32c(sample["jpg"]) == row["crc32c"] and int(sample["cls"]) == row["label"]


def test_same_images_in_both_formats(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "source")
    manifests = {}
    for shard_format in ("ffcv", "dali"):
        options = PrepareOptions(
            out=tmp_path / shard_format,
            format=shard_format,  # type: ignore[arg-type]
            num_workers=1,
            progress=False,
        )
        manifests[shard_format] = prepare(open_source(source), options)
    for split in ("train", "val"):
        indexes = [load_index(tmp_path / name, manifests[name], split) for name in manifests]  # type: ignore[arg-type]
        for field in ("crc32c", "label", "length", "width", "height"):
            assert np.array_equal(indexes[0][field], indexes[1][field])
    assert manifests["ffcv"].mean == manifests["dali"].mean  # type: ignore[union-attr]


def test_a_tar_has_no_time_in_it(tmp_path: Path) -> None:
    import tarfile

    source = write_image_folder(tmp_path / "source")
    options = PrepareOptions(out=tmp_path / "out", format="dali", num_workers=1, progress=False)
    prepare(open_source(source), options)
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "out" / "train-00000.tar").read_bytes())) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
    assert [m.name for m in members[:2]] == ["000000000.jpg", "000000000.cls"]
