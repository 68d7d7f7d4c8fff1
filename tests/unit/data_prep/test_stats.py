"""The data card says what the manifest says; the audit finds what was planted, and nothing else."""

from __future__ import annotations

import argparse
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import data_prep.stats.fingerprints as fingerprints
import data_prep.stats.search as search
from data_prep import stats
from data_prep.manifest import Manifest, load_index, load_keys, load_manifest, save_manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from data_prep.stats.audit import audit
from data_prep.stats.audit_report import AuditReport, summary_lines
from data_prep.stats.contact_sheet import choose_rows
from data_prep.stats.samples import open_data_set
from data_prep.storage import LocalFolder
from data_prep.verify import verify

HOSTILE = "<img src=x onerror=alert(1)>"


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A picture with coarse and fine structure, unlike that of any other seed."""
    generator = np.random.default_rng([7, seed])
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((4, 60), (8, 40), (16, 30), (40, 15)):
        grid = generator.uniform(-1, 1, (cells, cells, 3))
        layers = [
            Image.fromarray(grid[..., channel].astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for channel in range(3)
        ]
        pixels += weight * np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return Image.fromarray((118 + pixels).clip(0, 255).astype(np.uint8))


def save(picture: Image.Image, path: Path, quality: int = 92) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=quality)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of unrelated pictures with known duplicates and faults among them; not to be written to."""
    root = tmp_path_factory.mktemp("planted")
    source = root / "source"
    for number in range(12):
        save(scene(number), source / "train" / "ant" / f"{number}.jpg")
        save(scene(100 + number), source / "train" / HOSTILE / f"{number}.jpg")
        save(scene(200 + number), source / "val" / ("ant", HOSTILE)[number % 2] / f"{number}.jpg")
    save(scene(0), source / "train" / "ant" / "exact.jpg")  # the same bytes as 0.jpg
    save(scene(1), source / "val" / HOSTILE / "leak_q60.jpg", quality=60)
    save(scene(101).resize((104, 78)), source / "train" / HOSTILE / "resized.jpg")
    save(ImageEnhance.Brightness(scene(200)).enhance(1.05), source / "val" / "ant" / "brighter.jpg")
    save(Image.new("RGB", (90, 60), (40, 90, 160)), source / "train" / "ant" / "flat.jpg")
    save(Image.new("RGB", (60, 90), (200, 90, 60)), source / "train" / "ant" / "flat too.jpg")
    save(scene(300, 50, 20), source / "train" / HOSTILE / "tiny.jpg")
    prepare(open_source(source), PrepareOptions(out=root / "data", num_workers=1, progress=False))
    return root / "data"


@pytest.fixture(scope="module")
def report(planted: Path) -> AuditReport:
    return audit(open_data_set(str(planted)), num_workers=1, progress=False)


def names(samples: tuple) -> set[str]:
    return {sample.key.removeprefix("train/").replace(HOSTILE, "bug") for sample in samples}


def test_planted_duplicates_are_found_and_nothing_else(report: AuditReport) -> None:
    found = {frozenset(names(cluster.samples)): cluster for cluster in report.clusters}
    assert set(found) == {
        frozenset({"ant/1.jpg", "val/bug/leak_q60.jpg"}),
        frozenset({"ant/0.jpg", "ant/exact.jpg"}),
        frozenset({"bug/1.jpg", "bug/resized.jpg"}),
        frozenset({"val/ant/0.jpg", "val/ant/brighter.jpg"}),
    }
    kinds = {min(pair): cluster.kind for pair, cluster in found.items()}
    assert kinds == {"ant/1.jpg": "near", "ant/0.jpg": "bytes", "bug/1.jpg": "near", "val/ant/0.jpg": "near"}
    first = report.clusters[0]
    assert first.crosses_splits and first.has_conflicting_labels
    assert not any(cluster.crosses_splits for cluster in report.clusters[1:])


def test_constant_and_tiny_images_are_listed(report: AuditReport) -> None:
    assert names(report.constant) == {"ant/flat.jpg", "ant/flat too.jpg"}
    assert names(report.tiny) == {"bug/tiny.jpg"}
    assert report.damaged == ()


def test_summary_names_the_leak_first(report: AuditReport) -> None:
    lines = summary_lines(report)
    assert lines[0] == "1 image of val is also in train (1 with another label)"
    assert "8 images in 4 groups of duplicates (1 exact, 3 near); 4 could be left out" in lines
    assert "2 images of a single colour" in lines and "1 image with a side below 32 pixels" in lines


def test_workers_find_the_same(planted: Path, report: AuditReport) -> None:
    assert audit(open_data_set(str(planted)), num_workers=2, progress=False) == report


def test_written_files(planted: Path, report: AuditReport, tmp_path: Path) -> None:
    page = stats.write_card(str(planted), tmp_path / "card", audit=True, num_workers=1, progress=False)
    assert page == tmp_path / "card" / "data_card.html"
    assert AuditReport.model_validate_json((page.parent / "audit.json").read_text()) == report
    assert json.loads((page.parent / "audit.json").read_text())["counts"]["num_val_in_train"] == 1
    assert len((page.parent / "audit.csv").read_text().splitlines()) == 1 + 8
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "audit.csv", "audit.json", "data_card.html", "data_card.png",
    ]  # fmt: skip
    text = page.read_text()
    assert text.count('<div class="card cluster">') == 4 + 2  # clusters, constant, tiny
    assert "train and val" in text and "labels differ" in text


def test_names_and_keys_are_escaped(planted: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    manifest = load_manifest(planted)
    for name in [path.name for path in planted.iterdir() if path.is_file()]:
        (tmp_path / name).symlink_to(planted / name)
    (tmp_path / "manifest.json").unlink()
    save_manifest(LocalFolder(tmp_path), manifest.model_copy(update={"display_names": (hostile, "ant $x_")}))
    page = stats.write_card(str(tmp_path), tmp_path / "out", audit=True, num_workers=1, progress=False)
    text = page.read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert html.escape(hostile) in text and html.escape(HOSTILE) in text
    assert "default-src 'none'" in text and "http" not in re.sub(
        r"base64,[A-Za-z0-9+/=]+|http-equiv", "", text
    )


def test_counts_are_the_manifests(
    prepared: tuple[Path, Manifest], copy_of_prepared: Callable[[], Path]
) -> None:
    folder, manifest = copy_of_prepared(), prepared[1]
    page = stats.write_card(str(folder), None, progress=False)
    assert page == folder / "card" / "data_card.html"
    text = page.read_text()
    assert "203 images of 4 classes: 160 train, 43 val" in text
    rows = re.findall(r'<tr><td class="number">(\d+)</td><td>(\w+)</td>(.*?)</tr>', text)
    counts = [[int(value) for value in re.findall(r">(\d+)<", cells)] for _, _, cells in rows]
    assert [name for _, name, _ in rows] == list(manifest.class_names)
    train, val = (manifest.splits[split].class_counts for split in ("train", "val"))  # type: ignore[index]
    assert counts == [list(pair) for pair in zip(train, val, strict=True)]
    assert f"{manifest.mean[0]:.4f}" in text and manifest.source_fingerprint in text
    assert verify(folder, progress=False)[1] == []  # the card lies in the folder, and is none of its files
    with Image.open(folder / "card" / "data_card.png") as picture:
        picture.load()
        assert picture.width == 1800 and 1200 < picture.height < 4000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100


def test_choice_of_the_contact_sheet_is_seeded(prepared: tuple[Path, Manifest]) -> None:
    data_set = open_data_set(str(prepared[0]))
    first, again, other = (choose_rows(data_set, seed)[0] for seed in (0, 0, 1))
    assert [row.title for row in first] == ["class_0", "class_1", "class_2", "class_3"]
    assert all(len(row.pictures) == 6 for row in first)
    assert all(a.pictures[0].tobytes() == b.pictures[0].tobytes() for a, b in zip(first, again, strict=True))
    assert any(a.pictures[0].tobytes() != b.pictures[0].tobytes() for a, b in zip(first, other, strict=True))


def test_many_classes_and_no_val(tmp_path: Path) -> None:
    for label in range(70):
        folder = tmp_path / "source" / f"tench, Tinca tinca {label}"
        for number in range(41 if label == 3 else 1):
            save(scene(label * 100 + number, 48, 36), folder / f"{number}.jpg")
    source = open_source(tmp_path / "source", val_fraction=0.0001)
    folder = tmp_path / "data"
    # A set without val is what flat folders with one image a class give.
    for sample in source.samples:
        sample.split = "train"
    prepare(source, PrepareOptions(out=folder, num_workers=1, progress=False))
    text = stats.write_card(str(folder), None, audit=True, num_workers=1, progress=False).read_text()
    assert "110 images of 70 classes: 110 train" in text and "It has no validation split." in text
    assert "tench, Tinca tinca 69" in text


def damage(folder: Path, sample_id: int) -> str:
    manifest = load_manifest(folder)
    row = load_index(folder, manifest, "train")[sample_id]
    with (folder / manifest.splits["train"].shards[0].name).open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["length"]) // 2)
        file.write(b"\0\1\2\3")
    return load_keys(folder, manifest, "train")[sample_id]


def test_damaged_sample_is_named(
    copy_of_prepared: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of_prepared()
    key = damage(folder, 5)
    data_set = open_data_set(str(folder))
    with pytest.raises(ValueError, match=r"sample 5 of split train .* is damaged \(its CRC-32C differs\)"):
        data_set.read("train", 5)
    parser = argparse.ArgumentParser()
    stats.add_arguments(parser)
    assert stats.run(parser.parse_args([str(folder), "--audit", "--workers", "1"])) == 1
    report = AuditReport.model_validate_json((folder / "card" / "audit.json").read_text())
    assert [(entry.sample_id, entry.key) for entry in report.damaged] == [(5, key)]
    assert "sample 5 of split train" in capsys.readouterr().err
    assert "sample 5 of split train" in (folder / "card" / "data_card.html").read_text()


def test_missing_files_are_errors(copy_of_prepared: Callable[[], Path], tmp_path: Path) -> None:
    folder = copy_of_prepared()
    (folder / "train.beton").unlink()
    with pytest.raises(ValueError, match=r"train\.beton is missing"):
        stats.write_card(str(folder), None, progress=False)
    with pytest.raises(ValueError, match=r"train\.beton is missing"):
        audit(open_data_set(str(folder)), num_workers=2, progress=False)
    with pytest.raises(ValueError, match="does not exist"):
        stats.write_card(str(tmp_path / "nothing"), None)


def test_interrupted_audit_leaves_no_card(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fingerprints, "fingerprint_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stats.write_card(str(planted), tmp_path, audit=True, num_workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def random_hashes(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**64, count, dtype=np.uint64)


def test_search_finds_all_close_hashes() -> None:
    generator = np.random.default_rng(4)
    hashes = random_hashes(3000)
    for number in range(300):  # a copy of another one with up to 12 bits turned
        flips = generator.permutation(64)[: number % 13]
        hashes[number] = hashes[1000 + number]
        for bit in flips.astype(np.uint64):
            hashes[number] ^= np.uint64(1) << bit
    pairs, num_cut = search._close_pairs(hashes, max_neighbours=4096)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1
    wanted = np.argwhere(np.triu((64 - bits @ bits.T) / 2 <= search.MAX_HASH_DISTANCE, 1))
    assert num_cut == 0 and len(wanted) > 200
    assert np.array_equal(np.unique(pairs, axis=0), wanted)
    assert np.array_equal(search.count_bits(hashes), search.count_bits_by_arithmetic(hashes))


def test_crowd_of_equal_hashes_is_no_million_pairs() -> None:
    generator = np.random.default_rng(5)
    hashes = random_hashes(3000)
    hashes[:1000] = hashes[0]  # a thousand copies of one picture
    hashes[1000:2000] = hashes[1000]  # a thousand pictures of one hash
    thumbnails = generator.integers(0, 256, (3000, 16, 16, 3), dtype=np.uint8)
    thumbnails[:1000] = thumbnails[0]
    found = search.find_near_duplicates(hashes, thumbnails)
    assert len(found.pairs) == 999 and (found.pairs[:, 0] == 0).all() and (found.pairs[:, 1] < 1000).all()
    assert found.num_cut == 1000 - search.MAX_LOOKS


def test_bucket_too_large_is_cut_and_said() -> None:
    hashes = np.arange(500, dtype=np.uint64)  # two of the bands are the same throughout
    _, num_cut = search._close_pairs(hashes, max_neighbours=50)
    assert num_cut > 0


def is_confirmed(thumbnails: np.ndarray) -> list[bool]:
    """Would each of the thumbnails pass as a copy of the first, were their hashes equal?"""
    hashes = np.full(2, 77, np.uint64)
    return [
        len(search.find_near_duplicates(hashes, np.stack([thumbnails[0], other])).pairs) == 1
        for other in thumbnails[1:]
    ]


def test_another_colour_is_another_picture() -> None:
    picture = np.asarray(scene(1).resize((16, 16))) * 0.5 + 40
    tinted = picture + np.array([80, 0, -40])
    thumbnails = [picture, tinted, 255 - picture, picture * 0.8, picture + 30]
    assert is_confirmed(np.stack(thumbnails).clip(0, 255).astype(np.uint8)) == [False, False, True, True]


def test_likeness_without_the_same_detail_is_no_duplicate() -> None:
    one, two = np.random.default_rng(6).normal(0, 15, (2, 16, 16, 3))
    thumbnails = [128 + one, 128 + 0.6 * one + 0.8 * two, 128 + 0.95 * one + 0.3 * two]
    assert is_confirmed(np.stack(thumbnails).clip(0, 255).astype(np.uint8)) == [False, True]


def test_hash_is_imagehashs() -> None:
    import imagehash

    buffer = io.BytesIO()
    scene(1).save(buffer, "JPEG", quality=90)
    values = fingerprints.fingerprint_image(buffer.getvalue(), fingerprints.crc32c(buffer.getvalue()))
    prints = np.array([values], fingerprints.FINGERPRINT_DTYPE)
    with Image.open(buffer) as image:
        assert f"{int(prints['hash'][0]):016x}" == str(imagehash.phash(image))
