"""Pieces moved by several threads, files held open, and what a listing may say."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from train.checkpoint.mirror_listing import KEY, Latest, new_key, parse_latest
from train.checkpoint.transfer import HeldFile, InOrder


def test_results_come_in_order_and_not_far_ahead() -> None:
    taken, most_ahead = 0, 0

    def action(number: int) -> int:
        nonlocal most_ahead
        most_ahead = max(most_ahead, number - taken)
        time.sleep(random.random() * 0.003)
        return number * number

    found = []
    for result in InOrder(action, 60, threads=4):
        found.append(result)
        taken += 1
    assert found == [number * number for number in range(60)]
    assert most_ahead <= 4, "memory is bounded"
    assert list(InOrder(action, 0)) == []


def test_an_error_ends_the_rest() -> None:
    done = []

    def action(number: int) -> None:
        done.append(number)
        if number == 5:
            raise KeyError("five")

    with pytest.raises(KeyError, match="five"):
        list(InOrder(action, 1000, threads=3))
    assert len(done) < 20
    assert not [thread for thread in threading.enumerate() if thread.name == "mirror transfer"]


def test_a_held_file_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"first\n")
    held = HeldFile(path)
    digest = held.digest()
    with path.open("ab") as file:
        file.write(b"second\n")
    assert (held.read(0, 100), held.read(3, 2), held.read(6, 9)) == (b"first\n", b"st", b"")
    path.unlink()
    assert held.digest() == digest and held.num_bytes == 6
    held.close()
    held.close()
    with pytest.raises(OSError):
        held.read(0, 1)


def test_no_key_is_used_twice_and_each_is_accepted() -> None:
    keys = {
        new_key(folder, name, digest * 64, writer * 32, number)
        for folder, name in (("checkpoints", "step-00000560.pt"), ("files", "metrics.jsonl"))
        for digest in "ab"
        for writer in "01"
        for number in (1, 2)
    }
    assert len(keys) == 16 and all(KEY.fullmatch(key) for key in keys)
    assert new_key("checkpoints", "step-00000560.pt", "a" * 64, "0" * 32, 7) == (
        "checkpoints/step-00000560-aaaaaaaaaaaa-00000000-7.pt"
    )


def test_a_listing_says_what_is_wrong_with_it() -> None:
    latest = Latest(writer="0" * 32, sequence=3, run="demo")
    assert parse_latest(latest.encoded(), "here") == latest
    for content in (None, b"", b"{}", latest.encoded().replace(b'"version": 1', b'"version": 2')):
        with pytest.raises(ValueError, match=r"here cannot be used \(.+\): choose another run.name"):
            parse_latest(content, "here")
