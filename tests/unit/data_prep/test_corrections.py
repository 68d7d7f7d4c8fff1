"""Corrections of a label audit: left out with a reason, or of another class; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.corrections import Correction, LeftOutBlob, load_corrections, save_corrections
from data_prep.manifest import load_index, load_keys, load_manifest
from data_prep.sources.blobs import RangeBlob
from data_prep.verify import verify


def prepare(source: Path, out: Path, *words: str) -> int:
    return main(["prepare", "--source", str(source), "--out", str(out), "--workers", "1", *words])


def labels_by_key(folder: Path, split: str) -> dict[str, int]:
    manifest = load_manifest(folder)
    index = load_index(folder, manifest, split)  # type: ignore[arg-type]
    return dict(zip(load_keys(folder, manifest, split), index["label"].tolist(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("shard_format", ["ffcv", "dali"])
def test_left_out_and_of_another_class(image_folder: Path, tmp_path: Path, shard_format: str) -> None:
    dropped = [f"train/class_0/{number:03d}.jpg" for number in range(8)]  # more than --max-bad-fraction
    corrections = [Correction(key=key, given="class_0", verdict="drop") for key in dropped]
    corrections.append(
        Correction(key="val/class_1/002.jpg", given="class_1", verdict="relabel", class_name="class_2")
    )
    path = tmp_path / "corrections.json"
    save_corrections(path, corrections)
    assert prepare(image_folder, tmp_path / "plain", "--format", shard_format) == 0
    words = ("--format", shard_format, "--corrections", str(path))
    assert prepare(image_folder, tmp_path / "mended", *words) == 0
    manifest, faults = verify(str(tmp_path / "mended"), num_workers=1)
    assert faults == []
    assert manifest.quarantined_by_reason == {"label audit": 8}
    assert manifest.num_found == 51 == sum(s.num_samples for s in manifest.splits.values()) + 8
    lines = (tmp_path / "mended" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == dropped
    for split in ("train", "val"):
        expected = labels_by_key(tmp_path / "plain", split)
        expected = {key: label for key, label in expected.items() if key not in dropped}
        expected |= {"val/class_1/002.jpg": 2} if split == "val" else {}
        assert labels_by_key(tmp_path / "mended", split) == expected


def test_a_class_that_is_left_with_nothing_is_refused(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"train/class_0/{number:03d}.jpg" for number in range(12)]
    save_corrections(tmp_path / "c.json", [Correction(key=k, given="class_0", verdict="drop") for k in keys])
    assert prepare(image_folder, tmp_path / "out", "--corrections", str(tmp_path / "c.json")) == 1
    assert "class 'class_0' has no usable training image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"key": "elsewhere.jpg"}, "not one of the files is in this source"),
        ({"given": "class_1"}, "is 'class_0' here, but 'class_1' where it was audited"),
        ({"verdict": "relabel", "class_name": "class_22"}, "which is no class; did you mean 'class_2'?"),
        ({"verdict": "relabel"}, "class_name goes with relabel"),
        ({"verdict": "burn"}, "cannot be understood"),
        ({"more": 1}, "cannot be understood"),
    ],
)
def test_corrections_of_something_else(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, object],
    words: str,
) -> None:
    row = {"key": "train/class_0/000.jpg", "given": "class_0", "verdict": "drop"} | fields
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"version": 1, "corrections": [row]}))
    assert prepare(image_folder, tmp_path / "out", "--corrections", str(path)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_verdicts_on_one_image(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "train/class_0/000.jpg"
    one = Correction(key=key, given="class_0", verdict="drop")
    other = Correction(key=key, given="class_0", verdict="relabel", class_name="class_1")
    save_corrections(tmp_path / "a.json", [one])
    save_corrections(tmp_path / "b.json", [other])
    assert load_corrections(tmp_path / "b.json") == (other,)
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert prepare(image_folder, tmp_path / "out", "--corrections", *paths) == 1
    assert f"two verdicts on '{key}'" in capsys.readouterr().err


def test_the_same_command_again_finds_the_same_data_set(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_corrections(path, [Correction(key="val/class_0/000.jpg", given="class_0", verdict="drop")])
    words = ("--corrections", str(path))
    assert prepare(image_folder, tmp_path / "out", *words) == 0
    first = np.array(load_index(tmp_path / "out", load_manifest(tmp_path / "out"), "val"))
    assert prepare(image_folder, tmp_path / "out", *words) == 0
    assert np.array_equal(first, load_index(tmp_path / "out", load_manifest(tmp_path / "out"), "val"))
    assert prepare(image_folder, tmp_path / "out") == 1  # another data set than without


def test_a_relative_out_beside_a_left_out_image(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    key = "train/class_0/000.jpg"
    save_corrections(Path("c.json"), [Correction(key=key, given="class_0", verdict="drop")])
    assert prepare(image_folder, Path("data/mended"), "--corrections", "c.json") == 0
    assert load_manifest(Path("data/mended")).quarantined_by_reason == {"label audit": 1}
    # Where every image is left out, it is still known where they lie.
    keys = [str(path.relative_to(image_folder)) for path in sorted(image_folder.glob("*/*/*.*"))]
    every = [Correction(key=key, given=key.split("/")[1], verdict="drop") for key in keys]
    save_corrections(Path("all.json"), every)
    assert prepare(image_folder, image_folder / "out", "--corrections", "all.json") == 1
    assert "lies in the source" in capsys.readouterr().err


def test_left_out_objects_of_a_bucket_are_known_to_lie_there() -> None:
    blob = LeftOutBlob(RangeBlob("s3://bucket/a.jpg", 0, 10, "1"))
    assert blob.location == "s3://bucket/a.jpg" and blob.root is None


def test_a_relabel_of_a_file_that_is_not_in_the_source(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrections = [
        Correction(key="train/class_0/000.jpg", given="class_0", verdict="drop"),
        Correction(key="train/other/000.jpg", given="other", verdict="relabel", class_name="another"),
    ]
    save_corrections(tmp_path / "c.json", corrections)
    assert prepare(image_folder, tmp_path / "out", "--corrections", str(tmp_path / "c.json")) == 0
    said = capsys.readouterr()
    assert "1 left out, 0 of another class; 1 files are not in this source" in said.out + said.err
