"""Reading a file of `torch.save` that may come from anybody: nothing runs, and nothing grows beyond its file.

`torch.load(weights_only=True)` runs no code. It still inflates what is compressed, trusts the sizes that a
pickle announces, and follows any nesting, so the file is looked at first: the list of its records, and its
pickle, which is gone through with inert stand-ins for all that it may name. Only then torch reads it.

Example:
    >>> state = read_checkpoint_file(Path("runs/demo/checkpoints/best.pt"))
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.checkpoint.plain_pickle import UnsafeFile, check_pickle

MAX_DIRECTORY_BYTES = 16 << 20  # of the list of records: some 150,000
MAX_PICKLE_BYTES = 64 << 20  # without the tensors' values: a few hundred kB are usual
MAX_LINE_BYTES = 1 << 16
ZIP_MAGIC = b"PK\x03\x04"
# torch.save before version 1.6: a number of its own, as the first of several pickles.
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to `path`, on the CPU.

    Raises:
        ValueError: it is truncated, hostile, or no dictionary; one sentence, and nothing was run.
    """
    try:
        state = read_torch_file(path)
    except UnsafeFile as error:
        raise ValueError(f"checkpoint {path} is truncated or not a checkpoint ({error})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this project: it holds a {type(state).__name__}")
    return state


def content_fault(state: dict[str, Any]) -> str | None:
    """What cannot be in a complete checkpoint of this project, in a few words; None where all can be used."""
    names, weights = state["class_names"], (state["model"], state.get("ema", {}))
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return "its class_names are no texts"
    for key, above in (("mean", -math.inf), ("std", 0.0)):
        numbers = state[key]
        if not isinstance(numbers, list | tuple) or len(numbers) != 3:
            return f"its {key} is not three numbers"
        if not all(isinstance(n, int | float) and math.isfinite(n) and n > above for n in numbers):
            return f"its {key} is not three numbers"
    if not all(isinstance(w, dict) and all(isinstance(t, torch.Tensor) for t in w.values()) for w in weights):
        return "its weights are no tensors"
    return None if isinstance(state["progress"], dict) else "its progress is no mapping"


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU, where that is plain values and tensors.

    Raises:
        UnsafeFile: truncated, damaged or hostile.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise UnsafeFile("it is empty")
            _check(_File(file, status.st_size))
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnsafeFile:
        raise
    except Exception as error:  # damaged files raise whatever their bytes happen to mean
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150] or type(error).__name__
        raise UnsafeFile(reason) from None


class _File:
    """A file that is never asked for more than it has; not mapped, since a bad disk would end the process."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self.file, self.num_bytes = file, num_bytes

    def at(self, start: int, length: int) -> bytes:
        self.file.seek(max(0, start))
        return self.read(length)

    def read(self, length: int) -> bytes:
        return self.file.read(max(0, min(length, self.num_bytes - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline(MAX_LINE_BYTES)


def _check(file: _File) -> None:
    start = file.at(0, len(LEGACY_MAGIC))
    if start[:4] == ZIP_MAGIC:
        records = _records(file)
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len({name.partition("/")[0] for name in records}) != 1:
            raise UnsafeFile("it is a zip, but not one of torch.save")
        place, length = records[pickles[0]]
        if length > MAX_PICKLE_BYTES:
            raise UnsafeFile(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        prefix = f"{pickles[0].removesuffix('data.pkl')}data/"
        sizes = {name.removeprefix(prefix): entry[1] for name, entry in records.items()}
        check_pickle(io.BytesIO(file.at(place, length)), file.num_bytes, sizes)
    elif start == LEGACY_MAGIC:
        file.at(0, 0)
        for _ in range(4):  # the number, a version, the machine, and what was saved
            check_pickle(file, file.num_bytes, None)
    else:
        raise UnsafeFile("it is no file of torch.save, or more than plain values")


def _records(file: _File) -> dict[str, tuple[int, int]]:
    """Name → (offset, bytes) of a zip's records. UnsafeFile: a zip that torch.save does not write."""
    _check_directory(file)
    with zipfile.ZipFile(file.file) as archive:
        entries = archive.infolist()
    records: dict[str, tuple[int, int]] = {}
    for info in entries:
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeFile("its records are compressed, which torch.save never does")
        if not re.fullmatch(r"[\x20-\x7e]+", name) or "\\" in name:
            raise UnsafeFile("the name of a record is no plain text")
        header = file.at(info.header_offset, 30)
        if len(header) < 30 or header[:4] != ZIP_MAGIC:
            raise UnsafeFile("a record is not where its list says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > file.num_bytes:
            raise UnsafeFile("it ends within a record")
        records[name] = (start, info.file_size)
    # Torch's reader looks for names without regard to capitals.
    if len({name.lower() for name in records}) != len(entries):
        raise UnsafeFile("two of its records have one name")
    if sum(length for _, length in records.values()) > file.num_bytes:
        raise UnsafeFile("its records announce more bytes than the file has")
    return records


def _check_directory(file: _File) -> None:
    """That every reader of zips finds the same list: right before the end, and nothing after it."""
    misplaced = UnsafeFile("the list of its records is not at its end")
    stop = file.num_bytes - 22
    end = file.at(stop, 22)
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise misplaced
    length, start = plain = struct.unpack("<II", end[12:20])
    locator = file.at(stop - 20, 20)
    if stop >= 76 and locator[:4] == b"PK\x06\x07":  # sizes of more than 4 GB can be told
        stop -= 76
        record = file.at(stop, 56)
        if struct.unpack("<Q", locator[8:16]) != (stop,) or record[:4] != b"PK\x06\x06":
            raise misplaced
        length, start = struct.unpack("<QQ", record[40:56])
        if plain[0] not in (0xFFFFFFFF, length) or plain[1] not in (0xFFFFFFFF, start):
            raise UnsafeFile("it has two lists of its records")
    if start + length != stop:
        raise misplaced
    if length > MAX_DIRECTORY_BYTES:
        raise UnsafeFile("it has too many records")
