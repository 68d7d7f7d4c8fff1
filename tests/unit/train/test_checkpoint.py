"""Checkpoints: atomic, checked, pruned; damage is named and the one before it is used."""

from __future__ import annotations

import errno
import math
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import (
    CheckpointEntry,
    CheckpointStore,
    CheckpointWriter,
    load_checkpoint,
    state_sha256,
)
from train.checkpoint import files as files_module


def state(step: int) -> dict[str, Any]:
    return {"version": 1, "step": step, "model": {"weight": torch.full((50, 50), float(step))}}


def filled_store(folder: Path, best: int = 2, last: int = 5, keep_last: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder)
    for step in range(1, last + 1):
        store.save(state(step), step, is_best=step <= best, keep_last=keep_last)
    return store


def latest_step(store: CheckpointStore, said: list[str] | None = None) -> int:
    latest = store.latest(print if said is None else said.append)
    assert latest is not None
    assert load_checkpoint(store.folder / latest.name)["step"] == latest.step
    return latest.step


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    assert [entry.step for entry in store.manifest().checkpoints] == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("step-*.pt")) == [
        "step-00000002.pt",
        "step-00000004.pt",
        "step-00000005.pt",
    ]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    assert latest_step(store) == 5
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "best.safetensors")["weight"], state(2)["model"]["weight"])


def test_damaged_last_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    flip(tmp_path / "step-00000005.pt")
    said: list[str] = []
    assert latest_step(store, said) == 4
    assert "step-00000005.pt is damaged" in said[0] and "going on from step-00000004.pt" in said[1]
    # Not listed any more: what is saved from here on is newer than what is damaged.
    store.save(state(5), 5, is_best=False, keep_last=2)
    assert latest_step(store) == 5 and [e.step for e in store.manifest().checkpoints] == [2, 4, 5]


def test_truncated_and_missing_last_ones_are_passed_over(tmp_path: Path) -> None:
    store = filled_store(tmp_path, keep_last=3)
    os.truncate(tmp_path / "step-00000005.pt", 100)
    (tmp_path / "step-00000004.pt").unlink()
    said: list[str] = []
    assert latest_step(store, said) == 3
    assert "is truncated: 100 bytes instead of" in said[0] and "is missing" in said[1]


def test_damaged_best_is_mended_from_its_copy_and_the_other_way(tmp_path: Path) -> None:
    store = filled_store(tmp_path, best=5)
    flip(tmp_path / "step-00000005.pt")
    said: list[str] = []
    assert latest_step(store, said) == 5 and "was mended from best.pt" in said[1]
    flip(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "best.pt")
    store.publish_best()
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 5


def test_weights_of_a_best_one_that_is_lost_are_not_overwritten(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = filled_store(tmp_path, best=5)
    for name in ("step-00000005.pt", "best.pt"):
        flip(tmp_path / name)
    assert latest_step(store) == 4
    store.save(state(6), 6, is_best=False, keep_last=2)
    assert float(load_file(tmp_path / "former-best.safetensors")["weight"][0, 0]) == 5
    assert (tmp_path / "best.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "best.pt"
    ).stat().st_mode & 0o777


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_manifest_is_made_anew_from_the_files(tmp_path: Path, damage: str) -> None:
    store = filled_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.unlink() if damage == "missing" else os.truncate(path, 50)
    flip(tmp_path / "step-00000005.pt")
    said: list[str] = []
    assert latest_step(store, said) == 4
    assert any("step-00000005.pt is damaged" in line for line in said) and "was made anew" in said[-1]
    assert store.manifest().best == "step-00000002.pt"


def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled_store(tmp_path)
    monkeypatch.setattr(files_module, "READ_WAITS", (0.0, 0.0))

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cannot be read"):
        patch.setattr(files_module, "sha256_file", fail)
        store.latest()
    assert latest_step(store) == 5 and (tmp_path / "step-00000005.pt").is_file()


@pytest.mark.parametrize("damaged", ["step-00000002.pt", "best.pt"])
def test_no_worse_one_replaces_the_best_where_its_manifest_is_lost(tmp_path: Path, damaged: str) -> None:
    store = filled_store(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    flip(tmp_path / damaged)
    store.latest(lambda line: None)
    store.save(state(6), 6, is_best=False, keep_last=2)
    store.publish_best()
    kept = [path for path in (tmp_path / "best.pt", tmp_path / "former-best.pt") if path.is_file()]
    steps = [torch.load(path, weights_only=True)["step"] for path in kept]
    assert 2 in steps


def test_two_of_the_same_step_never_share_a_file(tmp_path: Path) -> None:
    store = filled_store(tmp_path, last=3)
    first = (tmp_path / "step-00000003.pt").read_bytes()
    store.save(state(3) | {"validated": True}, 3, is_best=True, keep_last=2)
    assert (tmp_path / "step-00000003.pt").read_bytes() == first
    latest = store.latest()
    assert latest is not None and load_checkpoint(tmp_path / latest.name)["validated"]
    assert load_checkpoint(tmp_path / "best.pt")["validated"]


def test_truncated_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    filled_store(tmp_path)
    os.truncate(tmp_path / "step-00000005.pt", 700)
    with pytest.raises(ValueError, match="is truncated: 700 bytes instead of"):
        load_checkpoint(tmp_path / "step-00000005.pt")
    alone = tmp_path / "elsewhere" / "model.pt"
    alone.parent.mkdir()
    alone.write_bytes((tmp_path / "step-00000004.pt").read_bytes()[:700])
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        load_checkpoint(alone)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    for path in tmp_path.glob("*.pt"):
        os.truncate(path, 10)
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        store.latest(lambda line: None)


class Writer:
    """A writer that remembers what it said."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.said: list[str] = []
        self.store = CheckpointStore(folder)
        self.writer = CheckpointWriter(self.store, keep_last, self.said.append)


def test_what_changes_right_after_the_call_is_not_in_the_file(tmp_path: Path) -> None:
    """The race: training changes weights, and lists of its state, while they are written."""
    writer = Writer(tmp_path).writer
    weights = torch.zeros(1000, 1000)
    memory = [1, 2, 3]
    for step in range(1, 6):
        weights.fill_(step)
        writer.submit(
            {"version": 1, "model": {"weight": weights}, "memory": memory, "ids": {"a": [step]}}, step, False
        )
        weights.fill_(-1)
        memory.append(step)
        writer.finish(20)
        saved = load_checkpoint(tmp_path / f"step-{step:08d}.pt")
        assert bool((saved["model"]["weight"] == step).all())
        assert saved["memory"] == [1, 2, 3, *range(1, step)] and saved["ids"] == {"a": [step]}
    assert len(writer._pool._free) == 1  # memory is used again


def test_the_newest_wins_and_the_best_is_kept_where_the_writer_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    plain = CheckpointStore._write

    def slow(*arguments: Any) -> CheckpointEntry:
        go_on.wait(20)
        return plain(*arguments)

    monkeypatch.setattr(CheckpointStore, "_write", slow)
    case = Writer(tmp_path, keep_last=9)
    for step in (1, 2, 3, 4, 5):
        case.writer.submit(state(step), step, is_best=step == 3)
        if step == 1:
            while case.writer._jobs or not case.writer._is_busy:
                time.sleep(0.01)
    go_on.set()
    case.writer.finish(20)
    assert [entry.step for entry in case.store.manifest().checkpoints] == [1, 3, 5]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 3


def test_disk_that_is_full_costs_a_warning_until_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Writer(tmp_path)
    case.writer.submit(state(1), 1, True)
    case.writer.finish(20)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module.HashedFile, "write", full)
        case.writer.submit(state(2), 2, True)
        with pytest.raises(RuntimeError, match=r"is full: free some space; that of step 1 stands"):
            case.writer.finish(0.5)
    assert "step 2 was not written" in case.said[0] and load_checkpoint(tmp_path / "best.pt")["step"] == 1
    case.writer.submit(state(3), 3, False)
    case.writer.finish(20)  # the best one was not forgotten
    assert [e.step for e in case.store.manifest().checkpoints] == [2, 3]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "is on a read-only disk: mount it for writing"),
        (errno.EACCES, "may not be written to: change its permissions"),
        (errno.EMFILE, "too many files open: raise the limit"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_other_troubles_of_a_disk_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    case = Writer(tmp_path)
    case.writer.submit(state(1), 1, True)
    case.writer.finish(20)

    def fail(*arguments: object) -> int:
        raise OSError(number, "an error of the test")

    monkeypatch.setattr(files_module.HashedFile, "write", fail)
    case.writer.submit(state(2), 2, True)
    with pytest.raises(RuntimeError, match=words):
        case.writer.finish(0.3)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1 and "that of step 1 stands" in case.said[0]


def test_a_disk_that_did_not_read_at_the_start_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled_store(tmp_path)
    monkeypatch.setattr(files_module, "READ_WAITS", ())

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "sha256_file", fail)
        case = Writer(tmp_path)
        case.writer.finish(20)
    assert "cannot be read" in case.said[0]
    case.writer.submit(state(6), 6, False)
    case.writer.finish(20)
    assert latest_step(case.store) == 6


def test_spoilt_weights_replace_nothing_and_are_a_fault(tmp_path: Path) -> None:
    case = Writer(tmp_path)
    case.writer.submit(state(1), 1, True)
    case.writer.finish(20)
    case.writer.submit({"version": 1, "model": {"weight": torch.tensor([1.0, math.nan])}}, 2, True)
    with pytest.raises(RuntimeError, match="non-finite at step 2"):
        case.writer.finish(20)
    assert case.writer.fault is not None and latest_step(case.store) == 1


def test_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    for name, save in (("a.pt", torch.save), ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"version": 1, "model": Hostile()}, tmp_path / name)
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")


def test_state_hash_tells_equal_from_different() -> None:
    a = {"x": torch.zeros(3), "y": torch.ones(2, dtype=torch.bfloat16)}
    assert state_sha256(a) == state_sha256({"y": a["y"].clone(), "x": a["x"].clone()})
    assert state_sha256(a) != state_sha256(a | {"x": torch.tensor([0, 0, 1e-9])})
