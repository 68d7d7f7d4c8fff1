"""Files that may come from anybody: nothing of them runs, and none takes more memory or time than its size."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import CHECKPOINT_VERSION, load_checkpoint, read_torch_file
from train.models.weights import read_weights

torch.set_num_threads(1)


def saved(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def state(**values: Any) -> dict[str, Any]:
    return {"version": CHECKPOINT_VERSION, "model": {"weight": torch.arange(64.0)}, **values}


def rewritten(
    content: bytes,
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> bytes:
    """The same zip as another program writes it, its records changed by `change`."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return rewritten(saved(state()), lambda name, old: data if name.endswith("data.pkl") else old)


class Runs:
    """Would make a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def protocol_2(code: bytes) -> bytes:
    return b"\x80\x02" + code + b"."


def laughs(levels: int) -> bytes:
    """A list of ten times one list of ten times one list …: 10**levels values in a few hundred bytes."""
    code = b"]q\x00"
    for level in range(levels):
        code += b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1)
    return protocol_2(code)


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def doubled_end(content: bytes) -> bytes:
    """Two lists of records: one before the end, and another one that the end names."""
    return content[:-22] + content[-22:-6] + struct.pack("<I", 0) + b"\0\0"


def few_but_large() -> bytes:
    """A pickle whose tensor has a million times the values of its storage, all of them the same one."""
    return saved(state(mask=torch.ones(1).expand(1 << 15, 1 << 15)))


SIXTY_FOUR = b"K\x40"  # the number of values of `weight` in a pickle
MILLIONS = b"J\x00\x00\x00\x10"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (
        lambda: rewritten(
            saved(state()),
            lambda name, old: bytes(64 << 20) if name.endswith("data/0") else old,
            zipfile.ZIP_DEFLATED,
        ),
        "compressed",
    ),
    "more values than bytes": (
        lambda: rewritten(
            saved(state()),
            lambda name, old: old.replace(SIXTY_FOUR, MILLIONS) if name.endswith("data.pkl") else old,
        ),
        "more values than the file has",
    ),
    "legacy with more values than bytes": (
        lambda: saved(state(), legacy=True).replace(SIXTY_FOUR, MILLIONS),
        "more values than the file has",
    ),
    "expanded": (few_but_large, "many times larger than the file"),
    "a list of lists of one list": (lambda: with_pickle(laughs(30)), "too many values"),
    "nested": (lambda: with_pickle(protocol_2(b"]" * 100_000 + b"a" * 99_999)), "nested too deeply"),
    "a list in itself": (lambda: with_pickle(protocol_2(b"]q\x00h\x00a")), "nested too deeply"),
    "a key that hashes for ever": (
        lambda: with_pickle(protocol_2(b"})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s")),
        "neither a text nor a number",
    ),
    "an array of terabytes": (
        lambda: with_pickle(protocol_2(b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R")),
        "builtins.bytearray",
    ),
    "a text of gigabytes": (lambda: with_pickle(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40)), ""),
    "two records of one name": (
        lambda: rewritten(saved(state()), extra={"ARCHIVE/data.pkl": b"x"}),
        "one name",
    ),
    "another zip": (lambda: rewritten(saved(state()), extra={"elsewhere/data.pkl": b"x"}), "not one of torch"),
    "bytes after the end": (lambda: saved(state()) + b"\0" * 30, "not at its end"),
    "bytes before the start": (lambda: saved({}) + saved(state()), "not at its end"),
    "two lists": (lambda: doubled_end(saved(state())), "list"),
    "no torch.save at all": (lambda: b"\0" * 1000, "no file of torch.save"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_checkpoints_that_would_grow_are_refused(tmp_path: Path, name: str) -> None:
    make, reason = BOMBS[name]
    path = tmp_path / "bomb.pt"
    path.write_bytes(make())
    for read in (load_checkpoint, read_weights):
        with pytest.raises(ValueError, match="is truncated") as caught:
            read(path)
        assert reason in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["value", "key of the optimizer", "state of a dictionary"])
def test_pickles_run_nothing(tmp_path: Path, where: str, legacy: bool) -> None:
    hostile = Runs(str(tmp_path / "ran"))
    content = {
        "value": state(progress=hostile),
        "key of the optimizer": state(optimizer={"state": {0: [hostile]}}),
        "state of a dictionary": state(model=OrderedDict(weight=hostile)),
    }[where]
    path = tmp_path / "model.pt"
    path.write_bytes(saved(content, legacy))
    for read in (load_checkpoint, read_weights):
        with pytest.raises(ValueError, match="posix.mkdir"):
            read(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):  # torch itself would not have run it either
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir(), "this pickle runs nothing, so it proves nothing"


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_training_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    content = state(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        schedule=schedule.state_dict(),
        random=torch.get_rng_state(),
        values=(1, -2.5, None, True, 10**30, "Wörter", b"\xff\0", torch.Size([2, 3]), torch.bfloat16),
        parameter=torch.nn.Parameter(torch.ones(3)),
        seen=torch.arange(12).view(3, 4).t()[1:],
        wide=torch.ones(1).expand(50),
        empty=torch.zeros(0, 7),
        half=torch.ones(4, dtype=torch.bfloat16),
    )
    (tmp_path / "model.pt").write_bytes(saved(content, legacy))
    loaded = read_torch_file(tmp_path / "model.pt")
    assert loaded["values"] == content["values"] and loaded["schedule"] == content["schedule"]
    for name in ("random", "parameter", "seen", "wide", "empty", "half"):
        assert torch.equal(loaded[name], content[name])
    for one, other in zip(loaded["model"].values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
