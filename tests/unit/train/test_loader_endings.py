"""Workers that die, stop or wait: an error that says what is stuck, and a loader that can be closed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.unit.train.loader_cases import NUM_TRAIN, Case, StuckReader, consume, long_but, read_with, training
from train.data.loaders import base, build_loader, waiting
from train.data.loaders.waiting import Prefetch

Prepared = tuple[Path, Manifest]
WORKERS = Case("reference", num_workers=2)
SECONDS = 20


def eventually(condition: object) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(condition())  # type: ignore[operator]


@pytest.mark.parametrize("num_taken", [1, NUM_TRAIN // 16])
def test_a_killed_worker_is_an_error(prepared: Prepared, num_taken: int) -> None:
    loader = build_loader("reference", training(*prepared, WORKERS))
    batches = loader.epoch(0, resolution=32)
    for _ in range(num_taken):  # in the middle of an epoch, or between two
        next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    assert eventually(lambda: not multiprocessing.active_children())
    with pytest.raises(RuntimeError, match=r"worker.*(killed|exited)"):
        list(batches)
        consume(loader, epoch=1)
    loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_taken", [1, NUM_TRAIN // 16 + 1])
def test_a_stopped_worker_is_named(prepared: Prepared, num_taken: int) -> None:
    loader = build_loader("reference", training(*prepared, WORKERS))
    batches = loader.epoch(0, resolution=32)
    taken = [batch for batch, _ in zip(batches, range(num_taken), strict=False)]
    assert taken
    # Only now: workers need longer than that to start.
    loader.plan = dataclasses.replace(loader.plan, timeout_seconds=1.0)
    loader._watchdog = waiting.Watchdog(1.0, loader._where)
    stopped = multiprocessing.active_children()[0].pid
    os.kill(stopped, signal.SIGSTOP)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=rf"in process {stopped} \(stopped by a signal\)"):
        list(batches)
        consume(loader, epoch=1)
    loader.close()
    assert not multiprocessing.active_children()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until this is set, the disk answers nobody who reads sample 17, or the keys."""

    def no_keys(*_: object) -> None:
        raise AssertionError("the keys lie on the same disk")

    monkeypatch.setattr(base, "load_keys", no_keys)
    monkeypatch.setattr(waiting, "JOIN_SECONDS", 0.5)
    StuckReader.released.clear()
    yield StuckReader.released
    StuckReader.released.set()


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_a_stuck_disk_is_named_and_left(
    prepared: Prepared, case: Case, stuck: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = build_loader(case.backend, training(*prepared, case, timeout_seconds=8.0))
    if case.backend == "ffcv":  # compiled before: that may take longer than the timeout
        before = build_loader(case.backend, training(*prepared, case))
        next(before.epoch(1, resolution=32))
        before.close()
    threads = threading.active_count()
    place = f"reading sample 17 in {prepared[0] / 'train.beton'}"
    with pytest.raises(RuntimeError, match=r"no batch came for .* raise data\.timeout_seconds") as caught:
        consume(read_with(loader, StuckReader))
    assert place in str(caught.value)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "no batch for" in line]
    assert warnings and place in warnings[-1] and warnings[0].startswith("rank 0: ")
    loader.close()
    assert not multiprocessing.active_children()
    stuck.set()
    assert eventually(lambda: threading.active_count() <= threads)


def test_a_slow_disk_is_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    answers = threading.Event()
    slow = Prefetch((answers.wait() for _ in range(1)), 1, "slow")
    spoken: list[str] = []

    def where() -> str:
        spoken.append("somewhere")
        if len(spoken) == 2:
            answers.set()
        return "somewhere"

    assert waiting.Watchdog(5.0, where).get(slow.poll) is True
    slow.close()
    assert capfd.readouterr().err.count("the loader is somewhere") == 2


def test_prefetch_hands_on_errors_and_says_the_end_again() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("odd")

    failing = Prefetch(items(), 1, "failing")
    assert failing.take() == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="odd"):
            failing.take()
    failing.close()
    with pytest.raises(RuntimeError, match="failing was closed"):
        failing.take()
    finished = Prefetch(iter([1]), 1, "finished")
    assert [finished.take() for _ in range(3)] == [1, None, None]
    finished.close()
