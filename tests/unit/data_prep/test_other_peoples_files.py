"""Nothing of the user's is overwritten or deleted, and what belongs to a data set can be made again."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.copying import copy_data_set
from data_prep.manifest import Manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from data_prep.storage import LocalFolder, open_folder
from data_prep.verify import verify
from tests.conftest import SHARED_DATA, write_image_folder


def options(out: Path, **changes: object) -> PrepareOptions:
    return PrepareOptions(**({"out": out, "num_workers": 2, "progress": False} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["train-00007.tar", "val.beton", "quarantine.jsonl", "train.keys.txt"])
def test_foreign_files_are_not_overwritten(image_folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    for shard_format in ("ffcv", "dali"):
        with pytest.raises(ValueError, match=f"{name}.*would be overwritten"):
            prepare(open_source(image_folder), options(out, format=shard_format))
    assert (out / name).read_bytes() == b"mine"


def test_other_files_beside_the_data_set_stay(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / ".prepare" / "mine.txt").write_text("mine")
    prepare(open_source(image_folder), options(out))
    assert (out / "notes.txt").read_text() == (out / ".prepare" / "mine.txt").read_text() == "mine"
    assert verify(out, progress=False)[1] == []


def test_output_must_not_lie_in_the_source(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (image_folder, image_folder / "prepared", image_folder / "train" / "class_0" / "x"):
        assert main(["prepare", "--source", str(image_folder), "--out", str(out)]) == 1
        assert "lies in the source" in capsys.readouterr().err
        with pytest.raises(ValueError, match="lies in the source"):
            prepare(open_source(image_folder), options(out))
    (tmp_path / "link").symlink_to(image_folder)
    assert main(["prepare", "--source", str(image_folder), "--out", str(tmp_path / "link")]) == 1
    assert "lies in the source" in capsys.readouterr().err


def test_tars_of_the_source_are_never_replaced(image_folder: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    prepare(open_source(image_folder), options(tars, format="dali"))
    for name in ("manifest.json", "quarantine.jsonl"):
        (tars / name).unlink()
    before = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    for shard_format in ("ffcv", "dali"):
        with pytest.raises(ValueError, match="lies in the source"):
            prepare(open_source(tars, layout="webdataset"), options(tars, format=shard_format, seed=5))
    assert {path.name: path.read_bytes() for path in tars.glob("*.tar")} == before


def test_copy_overwrites_nothing_of_others(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "train.beton").write_bytes(b"mine")
    with pytest.raises(ValueError, match="there with another content"):
        copy_data_set(str(prepared[0]), str(target), progress=False)
    assert (target / "train.beton").read_bytes() == b"mine"


def test_lost_or_changed_quarantine_is_noticed_and_made_again(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "class_0" / "bad.jpg").write_bytes(b"junk")
    source, out = open_source(image_folder), tmp_path / "out"
    first = prepare(source, options(out))
    content = (out / "quarantine.jsonl").read_bytes()
    for damage in (None, content.replace(b"bad", b"BAD")):
        if damage is None:
            (out / "quarantine.jsonl").unlink()
        else:
            (out / "quarantine.jsonl").write_bytes(damage)
        assert any("quarantine.jsonl" in fault for fault in verify(out, progress=False)[1])
        assert prepare(source, options(out)) == first
        assert (out / "quarantine.jsonl").read_bytes() == content
        assert verify(out, progress=False)[1] == []


def test_old_data_sets_without_these_fields_still_work(
    copy_of_prepared: Callable[[], Path], tmp_path: Path
) -> None:
    import json

    folder = copy_of_prepared()
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("quarantine", "display_names"):
        del manifest[name]
    for split in manifest["splits"].values():
        del split["dali_indexes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder, progress=False)[1] == []
    copy_data_set(str(folder), str(tmp_path / "target"), progress=False)
    assert verify(tmp_path / "target", progress=False)[1] == []


@pytest.mark.parametrize("typo", ["s3:/bucket/x", "s3:bucket", "S3://bucket/x", "gs://bucket/x"])
def test_mistyped_addresses_make_no_folder(typo: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        open_folder(typo)


def test_a_file_system_without_locks_is_no_second_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with LocalFolder(tmp_path).lock():
        assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared images are not here")
@pytest.mark.parametrize("shard_format", ["ffcv", "dali"])
@pytest.mark.parametrize("name", ["imagenet_samples", "intel", "places40", "rocks"])
def test_the_shared_sets_prepare_and_verify(tmp_path: Path, name: str, shard_format: str) -> None:
    source = open_source(SHARED_DATA / name)
    manifest = prepare(source, options(tmp_path / "out", format=shard_format))
    assert manifest is not None and manifest.num_quarantined == 0
    assert sum(split.num_samples for split in manifest.splits.values()) == len(source.samples)
    assert verify(tmp_path / "out", progress=False)[1] == []
    shutil.rmtree(tmp_path / "out")


def test_options_are_named_in_errors(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["prepare", "--source", str(image_folder), "--out", str(image_folder.parent / "out")]
    for extra in (["--workers", "-1"], ["--seed", "-1"], ["--shard-mb", "0"], ["--quality", "101"]):
        assert main([*base, *extra]) == 1
        assert f"error: {extra[0]} is {extra[1]}" in capsys.readouterr().err


def test_prepared_twice_from_a_copy_of_the_source(tmp_path: Path) -> None:
    """A source that moved is the same source: only names, sizes and times count."""
    source = write_image_folder(tmp_path / "a" / "source")
    first = prepare(open_source(source), options(tmp_path / "out"))
    shutil.copytree(source, tmp_path / "b" / "source")  # keeps the times
    assert prepare(open_source(tmp_path / "b" / "source"), options(tmp_path / "out")) == first
