"""Waiting for batches without hanging: threads that end, and a watchdog that names the stuck part."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.5
WARNINGS_BEFORE_TIMEOUT = 5
JOIN_SECONDS = 10.0


class Watchdog:
    """Waits for something, says what it waits for, and gives up in the end.

    Args:
        timeout_seconds: how long to wait for one batch.
        where: what is being done at this moment, as words that follow "the loader is".
    """

    def __init__(self, timeout_seconds: float, where: Callable[[], str]) -> None:
        self._timeout_seconds = timeout_seconds
        self._where = where

    def get(self, poll: Callable[[float], T]) -> T:
        """What `poll(seconds)` returns; it raises `queue.Empty` while there is nothing.

        Raises:
            RuntimeError: nothing came within the timeout.
        """
        began = time.monotonic()
        interval = self._timeout_seconds / WARNINGS_BEFORE_TIMEOUT
        warned = 0
        while True:
            try:
                return poll(min(POLL_SECONDS, interval))
            except queue.Empty:
                waited = time.monotonic() - began
            if waited >= self._timeout_seconds:
                raise RuntimeError(
                    f"no batch came for {waited:.0f} s: the loader is {self._where()}; check that disk, or "
                    "raise data.timeout_seconds"
                )
            if waited >= (warned + 1) * interval:
                warned += 1
                rank = os.environ.get("RANK", "0")
                words = f"rank {rank}: no batch for {waited:.0f} s: the loader is {self._where()}"
                print(words, file=sys.stderr, flush=True)


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, some items ahead of whoever takes them.

    Args:
        items: run in the thread; its errors come out of `get`.
        depth: how many finished items may wait.
    """

    def __init__(self, items: Iterator[T], depth: int, name: str) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))
        finally:
            self._items = iter(())  # what it holds is freed here, not with the last reference to this

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                pass
        return False

    def poll(self, seconds: float) -> T | None:
        """The next item, or None at the end.

        Raises:
            queue.Empty: none within `seconds`.
            Exception: whatever the iterator raised; RuntimeError after `close`.
        """
        if self._end is None:
            try:
                # In no variable of this frame, which the error's traceback would keep, and it the error.
                item, self._end = self._queue.get(timeout=seconds)
            except queue.Empty:
                if self._closed.is_set():
                    raise RuntimeError(f"{self._thread.name} was closed") from None
                raise
            if self._end is None:
                return item
        # Kept for whoever asks again, as DALI does after an error.
        if isinstance(self._end, StopIteration):
            return None
        raise self._end

    def take(self) -> T | None:
        """The next item, or None at the end, however long it takes; for threads, which a watchdog watches."""
        while True:
            try:
                return self.poll(POLL_SECONDS)
            except queue.Empty:
                continue

    def close(self) -> None:
        """End the thread; one that is stuck in the kernel is left behind, and said."""
        self._closed.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(JOIN_SECONDS)
        self._end = None  # its traceback holds whatever the error passed through
        if self._thread.is_alive():
            print(f"the thread {self._thread.name} does not end: is its disk stuck?", file=sys.stderr)
