"""prepare: complete, deterministic, interruptible; verify: finds every kind of damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data_prep.workers as workers
from data_prep.__main__ import main
from data_prep.manifest import Manifest, load_index, load_keys, load_manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from data_prep.storage import LocalFolder, crc32c, exclusive_lock
from data_prep.verify import verify
from data_prep.writers.beton import BetonLayout, read_beton_tables
from tests.conftest import ROOT, write_image_folder


def options(out: Path, **changes: object) -> PrepareOptions:
    return PrepareOptions(**({"out": out, "num_workers": 1, "progress": False} | changes))  # type: ignore[arg-type]


def test_prepared_set_is_complete_and_verifies(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert manifest.class_names == ("class_0", "class_1", "class_2", "class_3")
    assert manifest.splits["train"].class_counts == (40, 40, 40, 40)
    assert manifest.splits["val"].class_counts == (10, 11, 11, 11)
    index = load_index(folder, manifest, "train")
    content = (folder / "train.beton").read_bytes()
    for row, key in zip(index, load_keys(folder, manifest, "train"), strict=True):
        jpeg = content[int(row["offset"]) : int(row["offset"] + row["length"])]
        assert jpeg[:2] == b"\xff\xd8" and crc32c(jpeg) == row["crc32c"]
        assert f"class_{row['label']}" in key
    assert verify(folder, progress=False)[1] == []


def test_train_is_shuffled_on_the_disk(prepared: tuple[Path, Manifest]) -> None:
    labels = load_index(prepared[0], prepared[1], "train")["label"]
    assert np.abs(np.diff(labels)).mean() > 0.5  # sorted, it would be 3 / 159


def test_result_does_not_depend_on_workers(image_folder: Path, tmp_path: Path) -> None:
    for count in (1, 3, 17):  # threads, and processes
        prepare(open_source(image_folder), options(tmp_path / str(count), num_workers=count))
    for name in ("train.beton", "val.beton", "train.index.npy", "train.keys.txt", "manifest.json"):
        contents = [(tmp_path / str(count) / name).read_bytes() for count in (1, 3, 17)]
        assert contents[0] == contents[1] == contents[2]


def test_found_is_prepared_plus_quarantined(image_folder: Path, tmp_path: Path) -> None:
    whole = (image_folder / "train" / "class_0" / "000.jpg").read_bytes()
    (image_folder / "train" / "class_0" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train" / "class_1" / "note.txt").write_bytes(b"hello")
    (image_folder / "val" / "class_2" / "zero.jpg").write_bytes(b"")
    manifest = prepare(open_source(image_folder), options(tmp_path / "out", max_bad_fraction=0.1))
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {
        "train/class_0/cut.jpg",
        "train/class_1/note.txt",
        "val/class_2/zero.jpg",
    }
    assert all(line["reason"] for line in lines)
    num_prepared = sum(split.num_samples for split in manifest.splits.values())
    assert manifest.num_found == num_prepared + 3 == 54 and manifest.num_quarantined == 3


def test_too_many_bad_files_stop_the_job(image_folder: Path, tmp_path: Path) -> None:
    for number in range(12):
        (image_folder / "train" / "class_0" / f"bad{number}.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"--max-bad-fraction.*not an image"):
        prepare(open_source(image_folder), options(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_class_of_broken_images_only(image_folder: Path, tmp_path: Path) -> None:
    for path in (image_folder / "train" / "class_1").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="class 'class_1' has no usable training image"):
        prepare(open_source(image_folder), options(tmp_path / "out", max_bad_fraction=0.9))


def test_second_start_finds_it_done_and_other_settings_are_refused(
    image_folder: Path, tmp_path: Path
) -> None:
    source = open_source(image_folder)
    first = prepare(source, options(tmp_path / "out"))
    time = (tmp_path / "out" / "train.beton").stat().st_mtime_ns
    assert prepare(source, options(tmp_path / "out")) == first
    assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == time
    with pytest.raises(ValueError, match="other files or settings"):
        prepare(source, options(tmp_path / "out", seed=1))


@pytest.mark.parametrize("stop_after", [0, 10, 36, 40])
def test_interrupted_then_started_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    source = open_source(image_folder)
    calm = prepare(source, options(tmp_path / "calm"))
    place, count = BetonLayout.place, 0

    def interrupted_place(self: BetonLayout, size: int) -> int:
        nonlocal count
        count += 1
        if count > stop_after:
            raise KeyboardInterrupt
        return place(self, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BetonLayout, "place", interrupted_place)
        prepare(source, options(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    train_was_done = (tmp_path / "out" / "train.beton").exists()
    assert train_was_done == (stop_after >= 36)
    before = (tmp_path / "out" / "train.beton").stat().st_mtime_ns if train_was_done else None
    assert prepare(source, options(tmp_path / "out")) == calm
    if train_was_done:
        assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == before
    for name in ("train.beton", "val.beton", "manifest.json"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    leftovers = [path.name for path in (tmp_path / "out").rglob("*") if "partial" in path.name]
    assert leftovers == []


def test_second_writer_is_refused(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with exclusive_lock(tmp_path / "out"), pytest.raises(RuntimeError, match="another process"):
        prepare(open_source(image_folder), options(tmp_path / "out"))


def damage_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def test_verify_names_damage(
    copy_of_prepared: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of_prepared()
    index = load_index(folder, load_manifest(folder), "train")
    damage_byte(folder / "train.beton", int(index["offset"][7]) + 300)
    assert main(["verify", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "SHA-256" in message and "sample 7 of split train is damaged" in message


def test_verify_names_a_truncated_shard(copy_of_prepared: Callable[[], Path]) -> None:
    folder = copy_of_prepared()
    with (folder / "val.beton").open("r+b") as file:
        file.truncate(1000)
    assert any("truncated" in fault for fault in verify(folder, progress=False)[1])


@pytest.mark.parametrize("name", ["../escape.beton", "/etc/passwd", "a/b"])
def test_manifest_may_not_point_outside(copy_of_prepared: Callable[[], Path], name: str) -> None:
    folder = copy_of_prepared()
    text = (folder / "manifest.json").read_text().replace("train.beton", name)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="plain name"):
        load_manifest(folder)


def test_no_manifest_no_data_set(copy_of_prepared: Callable[[], Path]) -> None:
    folder = copy_of_prepared()
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        load_manifest(folder)


def test_command_says_what_it_recognised(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--source", str(image_folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "as image-folder" in output and "3 classes, 36 train and 15 val" in output
    assert "51 found = 51 prepared + 0 quarantined" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "--source", "/nowhere", "--out", "out"],
        ["prepare", "--source", ".", "--out", "out", "--quality", "0"],
        ["verify", "/nowhere"],
    ],
)
def test_errors_are_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) != 0
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message


def test_beton_pages_are_never_crossed() -> None:
    sizes = np.random.default_rng(0).integers(1, 900_000, 40)
    layout = BetonLayout(capacity=50, align_bytes=2 << 20, page_bytes=2 << 20)
    offsets = [layout.place(int(size)) for size in sizes]
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset // (2 << 20) == (offset + int(size) - 1) // (2 << 20)
    assert all(end <= start for end, start in pairwise_ends(offsets, sizes))


def pairwise_ends(offsets: list[int], sizes: np.ndarray) -> list[tuple[int, int]]:
    return [(offsets[i] + int(sizes[i]), offsets[i + 1]) for i in range(len(offsets) - 1)]


def test_unfinished_beton_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(bytes(9 << 20))
    with pytest.raises(ValueError, match=r"no finished \.beton"):
        read_beton_tables(LocalFolder(tmp_path), "x.beton")


def test_worker_loss_is_one_sentence(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAX_THREADS", 0)  # processes, as with many workers
    monkeypatch.setattr(workers, "_normalize_task", _killed)
    with pytest.raises(RuntimeError, match="fewer --workers"):
        prepare(open_source(image_folder), options(tmp_path / "out"))


def _killed(*arguments: object) -> None:
    import os

    os._exit(9)


def test_strange_directory_entries_are_quarantined(image_folder: Path, tmp_path: Path) -> None:
    folder = image_folder / "train" / "class_0"
    os.mkfifo(folder / "pipe.jpg")  # reading it would wait for ever
    (folder / "dangling.jpg").symlink_to("/nowhere")
    (folder / "line\u2028end.jpg").write_bytes(b"junk")
    (folder / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"junk")
    manifest = prepare(open_source(image_folder), options(tmp_path / "out", max_bad_fraction=0.2))
    assert manifest.num_found == 55 and manifest.num_quarantined == 4
    assert "not a regular file" in manifest.quarantined_by_reason
    assert verify(tmp_path / "out", progress=False)[1] == []


@pytest.mark.parametrize("name", ["train.beton", "val.index.npy"])
def test_damaged_data_set_is_prepared_again(image_folder: Path, tmp_path: Path, name: str) -> None:
    source, out = open_source(image_folder), tmp_path / "out"
    prepare(source, options(out))
    whole = (out / name).read_bytes()
    damage_byte(out / name, len(whole) - 100)
    prepare(source, options(out))
    assert (out / name).read_bytes() == whole and verify(out, progress=False)[1] == []


def test_damaged_index_is_refused(copy_of_prepared: Callable[[], Path]) -> None:
    folder = copy_of_prepared()
    index = np.load(folder / "train.index.npy")
    index["label"] = 3 - index["label"]
    np.save(folder / "train.index.npy", index)
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        load_index(folder, load_manifest(folder), "train")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_prepare_leaves_no_process(tmp_path: Path, number: int) -> None:
    source = write_image_folder(tmp_path / "source", num_train=300)
    words = ["-m", "data_prep", "prepare", "--source", str(source), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (tmp_path / "out" / ".train.beton.partial").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    process.wait(30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _session_members(process.pid):
        time.sleep(0.1)
    assert _session_members(process.pid) == []


def _session_members(session: int) -> list[int]:
    """Process ids of a session, zombies aside, from /proc (a minimal system has no ps)."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has just ended
        if int(its_session) == session and state != "Z":
            members.append(int(path.parent.name))
    return members
