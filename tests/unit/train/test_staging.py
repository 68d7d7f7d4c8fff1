"""Staging on one machine, from a folder in S3's place: naming, reuse, mending, versions, room on the disk."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from data_prep.manifest import MANIFEST_NAME, Manifest, load_manifest
from data_prep.storage import exclusive_lock
from data_prep.verify import verify
from train.data import staging
from train.data.staging import check_staging, stage, staged_folder
from train.distributed import Ranks

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(copy_of_prepared: Callable[[], Path]) -> Path:
    return copy_of_prepared()


@pytest.fixture
def said() -> list[str]:
    return []


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def prepare_anew(source: Path) -> None:
    """Another manifest, the same files: a new version, cheaply."""
    manifest = source / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"tool_version": "', '"tool_version": "1'))


def no_copying(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing was to be copied")


def some_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))


def test_a_local_data_set_is_its_own_folder_at_once(tmp_path: Path) -> None:
    # There is no process group, so whatever ranks do together would fail.
    ranks = Ranks(2, 4, 0, 1, torch.device("cpu"), 1)
    for location in (tmp_path / "data", str(tmp_path / "data"), "data/intel"):
        assert staged_folder(location, tmp_path / "stage", ranks) == Path(location)
    assert not (tmp_path / "stage").exists()
    for typo in ("s3:/bucket/x", Path("s3://bucket/x"), "gs://bucket/x"):
        with pytest.raises(ValueError, match="no s3://bucket/prefix"):
            staged_folder(typo, tmp_path / "stage", ranks)


def test_the_copy_is_whole_and_the_next_start_reuses_it(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage(str(source), tmp_path / "new" / "stage", progress=False, say=said.append)
    assert files(first.folder) == files(source) and verify(first.folder, progress=False)[1] == []
    assert first.folder.parent == tmp_path / "new" / "stage"
    assert re.fullmatch(rf"copy-[0-9a-f]{{8}}-{first.manifest_sha256[:12]}", first.folder.name)
    assert str(source) in said[0] and "MB are to be copied" in said[0] and "checksums agree" in said[1]
    said.clear()
    monkeypatch.setattr(staging, "copy_data_set", no_copying)
    some_free(monkeypatch, 0)  # nor is there need of room
    assert stage(str(source), tmp_path / "new" / "stage", say=said.append) == first
    assert len(said) == 1 and f"staged copy {first.folder} of {source} is reused" in said[0]
    assert check_staging(str(source), tmp_path / "new" / "stage") == load_manifest(source)


def test_data_sets_of_one_name_do_not_meet(source: Path, tmp_path: Path, said: list[str]) -> None:
    other = Path(shutil.copytree(source, tmp_path / "elsewhere" / source.name))
    folders = {stage(str(place), tmp_path / "stage", False, said.append).folder for place in (source, other)}
    assert len(folders) == 2 and {folder.name[:5] for folder in folders} == {"copy-"}
    assert not any("other versions" in line for line in said)


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing"])
def test_a_file_of_another_size_is_copied_again(
    source: Path, tmp_path: Path, said: list[str], damage: str
) -> None:
    copy = stage(str(source), tmp_path, False, said.append)
    for name in ("train.beton", "val.keys.txt"):
        content = (copy.folder / name).read_bytes()
        if damage == "missing":
            (copy.folder / name).unlink()
        else:
            (copy.folder / name).write_bytes(content[:-1] if damage == "shorter" else content + b"1")
        said.clear()
        assert stage(str(source), tmp_path, False, said.append) == copy
        assert files(copy.folder) == files(source)
        assert not any("reused" in line for line in said)


def test_an_older_version_stays_beside_and_is_named(source: Path, tmp_path: Path, said: list[str]) -> None:
    older = stage(str(source), tmp_path / "stage", False, said.append)
    kept = files(older.folder)
    prepare_anew(source)
    newer = stage(str(source), tmp_path / "stage", False, said.append)
    assert newer.folder != older.folder and files(newer.folder) == files(source)
    assert files(older.folder) == kept
    assert "to be deleted if no run uses them" in said[-1] and str(older.folder) in said[-1]
    assert str(newer.folder) not in said[-1]


def test_a_disk_without_room_is_refused_before_anything_is_copied(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "stage"
    manifest = load_manifest(source)
    total = sum(entry.bytes for entry in manifest.files)
    some_free(monkeypatch, total - 1)
    sentence = rf"stage has [\d.]+ MB free, and {total / 1e6:,.1f} MB of .* set data.stage_folder to a larger"
    for attempt in (stage, check_staging):
        with pytest.raises(ValueError, match=sentence) as error:
            attempt(str(source), target)
        assert "other versions" not in str(error.value)
    assert not target.exists() and said == []
    some_free(monkeypatch, total)
    older = stage(str(source), target, False, said.append)
    prepare_anew(source)
    some_free(monkeypatch, total - 1)
    with pytest.raises(ValueError, match=r"copies of its other versions: .*MB") as error:
        stage(str(source), target)
    assert str(older.folder) in str(error.value)


def test_only_what_is_missing_needs_room(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = stage(str(source), tmp_path, False, said.append)
    size = (source / "train.beton").stat().st_size
    # An interrupted start: the manifest comes last, and of a shard the first piece has come.
    (copy.folder / MANIFEST_NAME).unlink()
    (copy.folder / "train.beton").unlink()
    with (copy.folder / ".train.beton.partial").open("wb") as file:
        file.write((source / "train.beton").read_bytes()[:65536])
        file.truncate(size)  # a hole, which takes no room
    some_free(monkeypatch, size - 65536 - 1)
    with pytest.raises(ValueError, match=r"set data\.stage_folder"):
        stage(str(source), tmp_path)
    some_free(monkeypatch, size - 65536)
    assert stage(str(source), tmp_path, False, said.append) == copy
    assert files(copy.folder) == files(source)


def test_a_stage_folder_that_is_none(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        for attempt in (stage, check_staging):
            with pytest.raises(
                ValueError, match=r"file is no folder that may be written to: set data\.stage"
            ):
                attempt(str(source), place)


def test_a_changed_manifest_in_a_copy_is_refused_and_left_alone(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    copy = stage(str(source), tmp_path, False, said.append)
    (copy.folder / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is not what was staged there: delete that folder"):
        stage(str(source), tmp_path, False, said.append)
    assert (copy.folder / MANIFEST_NAME).read_text() == "{}"


def test_a_data_set_prepared_anew_after_the_first_look(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two versions, neither may get into the other's folder."""

    def read_and_change(folder: object) -> tuple[Manifest, bytes]:
        content = (source / MANIFEST_NAME).read_bytes()
        manifest = load_manifest(source)
        prepare_anew(source)
        return manifest, content

    monkeypatch.setattr(staging, "read_manifest", read_and_change)
    with pytest.raises(ValueError, match="prepared anew meanwhile: run the same command again"):
        stage(str(source), tmp_path / "stage", False, said.append)
    assert not list((tmp_path / "stage").rglob("*.beton"))
    monkeypatch.undo()
    copy = stage(str(source), tmp_path / "stage", False, said.append)
    assert files(copy.folder) == files(source)


def test_a_source_that_gives_no_answer(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only copy is used if it is whole; else nobody can tell which version is meant."""
    target = tmp_path / "stage"

    def unreachable(folder: object) -> None:
        raise RuntimeError("reading manifest.json failed 10 times (EndpointConnectionError)")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "read_manifest", unreachable)
        with pytest.raises(RuntimeError, match=r"\(EndpointConnectionError\)$"):
            stage(str(source), target)
    copy = stage(str(source), target, False, said.append)
    said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "read_manifest", unreachable)
        assert stage(str(source), target, False, said.append) == copy
        assert len(said) == 1 and said[0].startswith("warning: the copy that an earlier run staged in")
        assert str(copy.folder) in said[0] and "EndpointConnectionError" in said[0]
        (copy.folder / "val.beton").rename(tmp_path / "val.beton")
        with pytest.raises(ValueError, match=r"EndpointConnectionError.* is not whole: start again when"):
            stage(str(source), target)
        (tmp_path / "val.beton").rename(copy.folder / "val.beton")
        # A newer version was begun.
        (target / copy.folder.name.replace(copy.manifest_sha256[:12], "0" * 12)).mkdir()
        with pytest.raises(ValueError, match=r"2 copies of it .* set data.path to one of them"):
            stage(str(source), target)


@pytest.mark.parametrize("other_finishes", [True, False])
def test_a_second_job_waits_for_the_first(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, other_finishes: bool
) -> None:
    copy = stage(str(source), tmp_path, False, said.append)
    (copy.folder / MANIFEST_NAME).unlink()
    monkeypatch.setattr(staging, "WAIT_SECONDS", 0.01)
    rounds = 0

    def release_in_the_third_round(seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            if other_finishes:
                shutil.copyfile(source / MANIFEST_NAME, copy.folder / MANIFEST_NAME)
            first.close()

    monkeypatch.setattr(staging.time, "sleep", release_in_the_third_round)
    said.clear()
    with ExitStack() as first:
        first.enter_context(exclusive_lock(copy.folder))
        assert stage(str(source), tmp_path, False, said.append) == copy
    assert files(copy.folder) == files(source)
    assert rounds == 3 and [line for line in said if "waiting for it" in line] == said[:1]
    assert ("is reused" in said[1]) == other_finishes
