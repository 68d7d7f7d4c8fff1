"""Use one loader in a process of its own, in good and bad ways; started by test_loading.

    python -m tests.integration.use_loader endings BACKEND NUM_WORKERS FOLDER

`endings` prints, as JSON, what each way to end left behind: threads, processes, files, maps; nothing, if all
is well. `forever` reads epoch after epoch until a signal comes, `whole` one epoch, and `stuck` meets a disk
that does not answer; none of them closes its loader. `signals` reads two epochs, and sends itself and all its
processes what a scheduler, a terminal or torchrun send to a whole job.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data_prep.manifest import load_manifest
from tests.unit.train.loader_cases import BrokenReader, Case, StuckReader, read_with, training
from train.data.job_signals import JOB_SIGNALS
from train.data.loaders import Loader, build_loader, waiting
from train.data.loaders import base as loaders_base


def held(folder: Path) -> dict[str, int]:
    """What this process holds at this moment."""
    files = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            files.append(str(link.readlink()))
        except OSError:  # the listing's own
            continue
    return {
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "python threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "files of the data set": sum(name.startswith(str(folder)) for name in files),
        "other files": sum(not name.startswith(str(folder)) for name in files),
        "maps": Path("/proc/self/maps").read_text().count(str(folder)),
    }


def left_behind(before: dict[str, int], folder: Path) -> dict[str, int]:
    """What is held now beyond what was held before; what is ending gets some seconds."""
    deadline = time.monotonic() + 5
    while True:
        now = held(folder)
        more = {name: now[name] - before[name] for name in now if now[name] > before[name]}
        if set(more) <= {"other files"}:
            break
        if time.monotonic() > deadline:
            return more
        time.sleep(0.05)
    # Pipes of a DataLoader's queues are freed with the cycles that hold them.
    gc.collect()
    return {"other files": more} if (more := held(folder)["other files"] - before["other files"]) > 0 else {}


class Endings:
    """Ways to end, each with a loader of its own."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder = folder
        self._plan = training(folder, load_manifest(folder), case)
        self._backend = case.backend

    def build(self) -> Loader:
        return build_loader(self._backend, self._plan)

    def whole_epoch(self) -> None:
        loader = self.build()
        for _ in loader.epoch(0, resolution=32):
            pass
        loader.close()
        loader.close()

    def never_used(self) -> None:
        self.build().close()

    def left_early(self) -> None:
        loader = self.build()
        for _ in loader.epoch(0, resolution=32):
            break
        loader.close()

    def error_of_the_consumer(self) -> None:
        loader = self.build()
        try:
            for _ in loader.epoch(0, resolution=32):
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        loader.close()

    def closed_in_the_middle(self) -> None:
        loader = self.build()
        batches = loader.epoch(0, resolution=32)
        next(batches)
        loader.close()
        # The generator is still held, as by the frame of a traceback, and in it a batch: shared memory.
        self.report("closed, its epoch still held")
        self.found["closed, its epoch still held"].pop("other files", None)
        del batches

    def epoch_forgotten(self) -> None:
        loader = self.build()
        list(loader.epoch(0, resolution=32))
        before = held(self.folder)
        batches = loader.epoch(0, resolution=32)
        next(batches)
        del batches
        gc.collect()
        self.report("epoch forgotten, loader open", before)
        loader.close()

    def loader_forgotten(self) -> None:
        loader = self.build()
        next(loader.epoch(0, resolution=32))
        del loader
        gc.collect()

    def error_in_a_worker(self) -> None:
        loader = self.build()
        try:
            list(read_with(loader, BrokenReader).epoch(0, resolution=32))
            raise AssertionError("the error did not come out")
        except ZeroDivisionError as error:
            assert "surprise" in str(error)
        loader.close()

    def error_while_building(self) -> None:
        check = loaders_base.SampleFetcher.__init__

        def failing(*_: object) -> None:
            raise ZeroDivisionError

        loaders_base.SampleFetcher.__init__ = failing  # type: ignore[assignment, method-assign]
        try:
            self.build()
            raise AssertionError("the error did not come out")
        except ZeroDivisionError:
            pass
        finally:
            loaders_base.SampleFetcher.__init__ = check  # type: ignore[method-assign]

    def report(self, name: str, before: dict[str, int] | None = None) -> None:
        self.found[name] = left_behind(before or self.before, self.folder)

    def run(self) -> None:
        self.found: dict[str, dict[str, int]] = {}
        # Pools of numba, OpenMP and DALI belong to the process: made once, they stay.
        for _ in range(2):
            self.whole_epoch()
        gc.collect()
        self.before = held(self.folder)
        ways: list[Callable[[], None]] = [
            self.whole_epoch,
            self.never_used,
            self.left_early,
            self.error_of_the_consumer,
            self.closed_in_the_middle,
            self.epoch_forgotten,
            self.loader_forgotten,
            self.error_in_a_worker,
            self.error_while_building,
        ]
        for way in ways:
            way()
            self.report(way.__name__)
        print(json.dumps(self.found))


def consume(loader: Loader, num_epochs: int) -> None:
    for epoch in range(num_epochs):
        for number, _ in enumerate(loader.epoch(epoch, resolution=32)):
            if (epoch, number) == (0, 1):
                print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)


def meet_signals(loader: Loader) -> None:
    """Prints the signals that came, and how many samples in spite of them."""
    came: list[str] = []
    for number in JOB_SIGNALS:
        signal.signal(number, lambda number, _frame: came.append(signal.Signals(number).name))
    num_samples = 0
    for epoch in range(2):
        for position, batch in enumerate(loader.epoch(epoch, resolution=32)):
            num_samples += len(batch.labels)
            if (epoch, position) == (0, 0):
                for number in JOB_SIGNALS:
                    os.killpg(0, number)
                    time.sleep(0.2)
                time.sleep(2 * waiting.POLL_SECONDS)  # somebody who died is missed by then
    loader.close()
    print(json.dumps([sorted(came), num_samples]))


if __name__ == "__main__":
    what, backend, num_workers, folder = sys.argv[1:]
    torch.set_num_threads(1)
    # A job in the background ignores Ctrl-C, and hands that on: here it must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    case = Case(backend, int(num_workers))
    if what == "endings":
        Endings(case, Path(folder)).run()
    else:
        plan = training(Path(folder), load_manifest(Path(folder)), case)
        loader = build_loader(backend, plan)
        if what == "signals":
            meet_signals(loader)
            sys.exit()
        consume(loader, 1_000_000 if what == "forever" else 1)
        if what == "stuck":
            # All is compiled by now, so that little time means that it is stuck.
            waiting.JOIN_SECONDS = 0.5
            loader = build_loader(backend, replace(plan, timeout_seconds=8.0))
            consume(read_with(loader, StuckReader), 1)
