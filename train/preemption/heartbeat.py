"""Ranks that hang: a stopped process or a lost machine ends the job in minutes, with a sentence.

Without this, the other ranks would wait in a reduction until the process group's timeout, and then say no
more than that something took long. Each rank writes a sign of life to the store of the rendezvous every
second, from a thread, and reads those of others. What counts as silence is measured on the reader's own
clock, and only as far as the reader itself was awake and the store answered: so a pause of all processes, a
laptop that slept, or a short failure of the network is nobody's fault. A thread beats also while its rank
saves, compiles or stages for an hour; a rank whose training stands still while its process lives is left to
the process group's timeout.

Example:
    >>> heartbeat = Heartbeat(ranks, 180.0, end_hung_job(folder, ranks.rank), lambda: run.progress.step)
    >>> ...
    >>> heartbeat.close()
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.distributed import Ranks

ALL_WATCH_ALL = 16  # ranks; in larger jobs each watches rank 0 and its neighbours, or the store gets no rest
FAREWELL_SECONDS = 1.0  # for `close`
LAST_WORDS_SECONDS = 10.0  # for a status on a file system that may be what hangs
LEFT = "left"
STATES = {
    "T": "its process was stopped by a signal",
    "t": "its process was stopped by a debugger",
    "D": "its process hangs in the kernel (a disk, a network file system or the GPU)",
    "Z": "its process has ended",
    "": "its process has ended",
}
ANYWHERE = "its process is stopped, or its machine is gone"


@dataclass
class _Beat:
    """What is known of another rank."""

    text: str = ""  # as it last wrote it
    age: float = 0.0  # seconds that this has stood unchanged

    @property
    def has_left(self) -> bool:
        return self.text == LEFT

    @property
    def fields(self) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            fields = json.loads(self.text)
            if isinstance(fields, dict):
                return fields
        return {}


class Heartbeat:
    """Made by all ranks; nothing is started where there is only one.

    Args:
        hang_seconds: a rank silent for so long, or a store without an answer, is taken for lost.
        on_hang: called once, from a thread, with a sentence; usually `end_hung_job`.
        step: this rank's step, to be told to the others; called from a thread.
    """

    def __init__(
        self, ranks: Ranks, hang_seconds: float, on_hang: Callable[[str], None], step: Callable[[], int]
    ) -> None:
        self._rank, self._hang_seconds = ranks.rank, hang_seconds
        self._on_hang, self._step = on_hang, step
        self._period = min(1.0, hang_seconds / 8)
        # What a gap between two of a thread's turns can count for, however long it was.
        self._longest_gap = max(2 * self._period, hang_seconds / 4)
        self._others = {rank: _Beat() for rank in watched_ranks(ranks.rank, ranks.world_size)}
        self._known: set[int] = set()  # ranks that have written something
        self._num_answers = 0  # of the store
        self._num_beats = 0
        self._place = _place()
        self._closed = threading.Event()
        self._has_called = threading.Lock()
        self._talker: threading.Thread | None = None
        if ranks.world_size == 1:
            return
        self._host = os.environ.get("MASTER_ADDR", "localhost")
        self._port = int(os.environ.get("MASTER_PORT", "29500"))
        # Of this start of the group only: the store outlives it, and its ranks' numbers come again.
        self._prefix = f"beat/{ranks.start_id}"
        self._talker = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._talker.start()
        # One of its own: where a machine has vanished, the talker waits for an answer without end.
        threading.Thread(target=self._watch_store, name="heartbeat store", daemon=True).start()

    def close(self) -> None:
        """Say goodbye, so that the others do not miss this rank; within two seconds, raises nothing."""
        self._closed.set()
        if self._talker is not None and self._talker is not threading.current_thread():
            self._talker.join(FAREWELL_SECONDS + self._period)

    def _talk(self) -> None:
        store: dist.Store | None = None
        last = time.monotonic()
        while not self._closed.is_set():
            try:
                store = store or self._connect()
                self._write(store)
                changed = self._read(store)
            except Exception:  # whatever it was: a new connection may do better, and the other thread waits
                store = None
            else:
                self._num_answers += 1
                now = time.monotonic()
                self._count(min(now - last, self._longest_gap), changed)
                last = now
            self._closed.wait(self._period)
        with contextlib.suppress(Exception):
            if store is not None:
                store.set(self._key(self._rank), LEFT)
                store.check([self._key(self._rank)])  # once this is answered it has arrived

    def _connect(self) -> dist.Store:
        # Python's own first: torch's tries in a loop, and writes a page of warnings.
        socket.create_connection((self._host, self._port), timeout=self._hang_seconds).close()
        return dist.TCPStore(
            self._host,
            self._port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=max(1.0, self._hang_seconds / 4)),
        )

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _write(self, store: dist.Store) -> None:
        self._num_beats += 1
        beat = {"beat": self._num_beats, "step": self._own_step(), "pid": os.getpid(), **self._place}
        store.set(self._key(self._rank), json.dumps(beat))

    def _own_step(self) -> int:
        try:
            return int(self._step())
        except Exception:  # there is no run yet
            return -1

    def _read(self, store: dist.Store) -> set[int]:
        """Look at the others; those whose beat is another one than last time."""
        for rank in self._others.keys() - self._known:
            if store.check([self._key(rank)]):  # to get what is not there would be to wait for it
                self._known.add(rank)
        known = [rank for rank in self._known if not self._others[rank].has_left]
        if not known:
            store.check([self._key(self._rank)])  # does it still answer?
            return set()
        changed = set()
        for rank, content in zip(known, store.multi_get([self._key(rank) for rank in known]), strict=True):
            text = content.decode(errors="replace")
            if text != self._others[rank].text:
                self._others[rank].text = text
                changed.add(rank)
        return changed

    def _count(self, seconds: float, changed: set[int]) -> None:
        """Whoever has not changed is older by the time since the last look."""
        silent = []
        for rank, beat in self._others.items():
            beat.age = 0.0 if rank in changed else beat.age + seconds
            if beat.age >= self._hang_seconds and not beat.has_left:
                silent.append(rank)
        if silent:
            self._call(self._sentence(sorted(silent)))

    def _sentence(self, silent: list[int]) -> str:
        parts = []
        for rank in silent[:4]:
            fields = self._others[rank].fields
            who = f"rank {rank}"
            if fields:
                who += f" (process {fields.get('pid')} on {fields.get('host')})"
            state = _state_of(fields, self._place)
            parts.append(f"{who} has given no sign of life for {self._hang_seconds:g} s: {state}")
        if len(silent) > 4:
            parts.append(f"and {len(silent) - 4} other ranks are silent, too")
        steps = {rank: beat.fields.get("step") for rank, beat in self._others.items()}
        steps[self._rank] = self._own_step()
        last = ", ".join(
            f"{step} of rank {rank}"
            for rank, step in sorted(steps.items())
            if isinstance(step, int) and step >= 0
        )
        return "; ".join(parts) + (f"; last steps: {last}" if last else "")

    def _watch_store(self) -> None:
        answers, silence, last = self._num_answers, 0.0, time.monotonic()
        while not self._closed.wait(self._period):
            now = time.monotonic()
            silence += min(now - last, self._longest_gap)
            last = now
            if answers != self._num_answers:
                answers, silence = self._num_answers, 0.0
            elif silence >= self._hang_seconds:
                self._call(
                    f"the rendezvous at {self._host}:{self._port} has not answered for "
                    f"{self._hang_seconds:g} s: the process that serves it is stopped, or its machine is gone"
                )
                return

    def _call(self, sentence: str) -> None:
        if not self._closed.is_set() and self._has_called.acquire(blocking=False):
            with contextlib.suppress(Exception):
                self._on_hang(sentence)
            self._closed.set()


def watched_ranks(rank: int, world_size: int) -> list[int]:
    """Whose signs of life a rank reads: of all; in large jobs of rank 0 and of its neighbours in a ring."""
    if world_size <= ALL_WATCH_ALL:
        return [other for other in range(world_size) if other != rank]
    return sorted({0, (rank - 1) % world_size, (rank + 1) % world_size} - {rank})


def end_hung_job(folder: Path, rank: int) -> Callable[[str], None]:
    """For `on_hang`: leave word in `status.json`, say it, and end this process, whatever it waits for.

    torchrun then ends the other ranks, and starts all of them again where it was told to.
    """

    def end(sentence: str) -> None:
        # In a thread: the disk, or whoever reads our output, may be what hangs.
        writer = threading.Thread(target=_last_words, args=(folder, rank, sentence), daemon=True)
        writer.start()
        writer.join(LAST_WORDS_SECONDS)
        os._exit(1)

    return end


def _last_words(folder: Path, rank: int, sentence: str) -> None:
    from train.run_folder import read_status, write_status

    with contextlib.suppress(Exception):
        # All ranks notice at about the same time; one sentence is enough.
        is_first = "status" not in read_status(folder)
        if is_first:
            write_status(folder, "restart", sentence)  # nothing of the run is wrong
            sys.stderr.write(f"error (rank {rank}): {sentence}\n")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


def _place() -> dict[str, str]:
    """This machine by its name, and where process numbers mean the same."""
    place = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["processes"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return place


def _state_of(fields: dict[str, Any], here: dict[str, str]) -> str:
    """Why a rank may be silent, by its last beat; more exactly where it is on this machine."""
    pid = fields.get("pid")
    if "processes" not in here or fields.get("processes") != here["processes"] or not isinstance(pid, int):
        return ANYWHERE
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = ""
    return STATES.get(state, "its process is there, but its threads do not run")
