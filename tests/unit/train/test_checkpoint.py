"""Checkpoints: atomic, checked, pruned; damage is named and the one before it is used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import train.checkpoint as checkpoint_module
from train.checkpoint import CheckpointStore, load_checkpoint, state_sha256


def state(step: int) -> dict[str, Any]:
    return {"version": 1, "step": step, "model": {"weight": torch.full((50, 50), float(step))}}


def filled_store(folder: Path, best: int = 2, last: int = 5, keep_last: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder)
    for step in range(1, last + 1):
        store.save(state(step), step, is_best=step <= best, keep_last=keep_last)
    return store


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    assert [entry.step for entry in store.manifest().checkpoints] == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("step-*.pt")) == [
        "step-00000002.pt",
        "step-00000004.pt",
        "step-00000005.pt",
    ]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    latest = store.load_latest()
    assert latest is not None and latest[1]["step"] == 5
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "best.safetensors")["weight"], state(2)["model"]["weight"])


def test_damaged_last_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    path = tmp_path / "step-00000005.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    latest = store.load_latest(said.append)
    assert latest is not None and latest[1]["step"] == 4
    assert len(said) == 1 and "step-00000005.pt is damaged" in said[0]


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
    for path in tmp_path.glob("step-*.pt"):
        os.truncate(path, 10)
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        store.load_latest(lambda line: None)


@pytest.mark.parametrize("point", ["write_atomically", "_publish_best", "_write"])
def test_crash_while_saving_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    store = filled_store(tmp_path, best=3, last=3)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_module if point == "write_atomically" else CheckpointStore, point, crash)
        store.save(state(4), 4, is_best=True, keep_last=2)
    latest = store.load_latest()
    assert latest is not None and latest[1]["step"] in (3, 4)
    # Between manifest and link, best.pt is the former best one: whole all the same.
    assert load_checkpoint(tmp_path / "best.pt")["step"] in (3, 4)
    store.save(state(5), 5, is_best=False, keep_last=2)
    latest = store.load_latest()
    assert latest is not None and latest[1]["step"] == 5


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
