"""Writing checkpoints in a thread of their own: the training loop waits for a copy in memory, not for a disk.

A disk that is full, read-only or gone costs a warning; training goes on, and the next checkpoint is tried
again. What was announced before always stands.

Example:
    >>> writer = CheckpointWriter(CheckpointStore(folder), keep_last=2, say=print)
    >>> writer.submit(state, step=560, is_best=True)   # returns when `state` may change again
    >>> writer.finish(timeout_seconds=60)
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from train.checkpoint.manifest import CheckpointManifest
from train.checkpoint.snapshot import Snapshot, SnapshotPool
from train.checkpoint.store import CheckpointStore

RETRY_SECONDS = 2.0  # between attempts, where somebody waits for the last one
SAY_EVERY_SECONDS = 60.0
SPOILT = (
    "weights or statistics are non-finite at step {step}: lower optimizer.peak_lr, or use "
    "precision.mode=fp32; the last checkpoint is from before that"
)


@dataclass(eq=False)
class _Job:
    snapshot: Snapshot
    step: int
    is_best: bool


class CheckpointWriter:
    """A thread that writes what is submitted, in order; the newest wins where it cannot keep up.

    Attributes:
        fault: why training must end, or None: weights that must not replace good ones.
        trouble: why the last attempt failed, or None where it went well.
    """

    def __init__(
        self,
        store: CheckpointStore,
        keep_last: int,
        say: Callable[[str], Any] = print,
        before_announcing: Callable[[], None] = lambda: None,
        announced: Callable[[CheckpointManifest], None] = lambda manifest: None,
    ) -> None:
        """
        Args:
            before_announcing: called in the thread when a file is durable and not yet named.
            announced: called in the thread with the manifest that names it.
        """
        self.fault: str | None = None
        self.trouble: str | None = None
        self.written_step: int | None = None
        self._store, self._keep_last, self._say = store, keep_last, say
        self._before_announcing, self._announced = before_announcing, announced
        self._pool = SnapshotPool()
        self._jobs: list[_Job] = []
        self._is_busy = True  # with what a crash may have left
        self._is_closed = self._is_awaited = False
        self._num_submitted = 0
        self._said_at = -SAY_EVERY_SECONDS
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def submit(self, state: dict[str, Any], step: int, is_best: bool) -> None:
        """Copy `state` and have it written; it may change as soon as this returns."""
        job = _Job(self._pool.take(state), step, is_best)
        with self._wake:
            # Not begun yet, and a newer one is here. The best one is wanted all the same, unless this is it.
            outdated = [old for old in self._jobs if is_best or not old.is_best]
            self._jobs = [old for old in self._jobs if old not in outdated] + [job]
            self._num_submitted += 1
            self._wake.notify_all()
        for old in outdated:
            self._pool.give_back(old.snapshot)

    def finish(self, timeout_seconds: float) -> None:
        """Wait until all that was submitted is on the disk; an attempt that failed is repeated meanwhile.

        Raises:
            RuntimeError: it is not there after that time.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._wake:
            self._is_awaited = True
            self._wake.notify_all()
            while self.fault is None and (self._jobs or self._is_busy):
                if (left := deadline - time.monotonic()) <= 0:
                    reason = self.trouble or f"it took longer than {timeout_seconds:.0f} s"
                    raise RuntimeError(f"the last checkpoint could not be written: {reason}")
                self._wake.wait(left)
            self._is_awaited = False
        if self.fault is not None:
            raise RuntimeError(self.fault)

    def close(self) -> None:
        """End the thread after what it is doing."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()

    def _work(self) -> None:
        self._tidy()
        with self._wake:
            self._is_busy = False
            self._wake.notify_all()
        while True:
            with self._wake:
                while not self._jobs and not self._is_closed:
                    self._wake.wait()
                if self._is_closed:
                    return
                job = self._jobs.pop(0)
                self._is_busy = True
            is_written = self._attempt(job)
            with self._wake:
                self._is_busy = False
                if is_written or self.fault is not None or self._is_outdated(job):
                    self._pool.give_back(job.snapshot)
                else:
                    self._jobs.insert(0, job)
                self._wake.notify_all()
                if not is_written:
                    self._pause()

    def _pause(self) -> None:
        """After an attempt that failed: until the next is submitted, or a little where somebody waits."""
        num_submitted = self._num_submitted
        while self._num_submitted == num_submitted and not self._is_closed and self.fault is None:
            if self._is_awaited:
                self._wake.wait(RETRY_SECONDS)
                return
            self._wake.wait()

    def _is_outdated(self, job: _Job) -> bool:
        return any(newer.is_best or not job.is_best for newer in self._jobs)

    def _tidy(self) -> None:
        """What a crash came before: the best one's copy, files that are not wanted any more."""
        try:
            self._store.publish_best()
            self._store.remove_unnamed()
        except Exception as error:  # a disk that does not read now must not end the thread that writes
            self._say(f"warning: {error}")

    def _attempt(self, job: _Job) -> bool:
        try:
            state = job.snapshot.wait()
            if not _is_finite(state["model"]):
                self.fault = SPOILT.format(step=job.step)
                return False
            self._write(job, state)
        except Exception as error:  # nothing that goes wrong here may end a training that can go on
            self.trouble = self._sentence(error)
            if time.monotonic() - self._said_at > SAY_EVERY_SECONDS:
                self._said_at = time.monotonic()
                self._say(f"warning: the checkpoint of step {job.step} was not written: {self.trouble}")
            return False
        if self.trouble is not None:
            self._said_at = -SAY_EVERY_SECONDS
            self._say(f"checkpoints are written again: step {job.step}")
        self.trouble = None
        self.written_step = job.step
        return True

    def _write(self, job: _Job, state: dict[str, Any]) -> None:
        arguments = (state, job.step, job.is_best)
        try:
            self._store.save(*arguments, self._keep_last, self._before_announcing)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._store.prune(1)  # what is older than the newest makes room
            self._store.save(*arguments, self._keep_last, self._before_announcing)
        self._announced(self._store.manifest())

    def _sentence(self, error: Exception) -> str:
        folder = self._store.folder
        stands = "" if self.written_step is None else f"; that of step {self.written_step} stands"
        if not isinstance(error, OSError):
            # torch.save tells of a failed write in words of its own.
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}{stands}"
        remedies = {
            errno.ENOSPC: f"the disk of {folder} is full: free some space",
            errno.EDQUOT: f"the quota of {folder} is used up: free some space",
            errno.EROFS: f"{folder} is on a read-only disk: mount it for writing",
            errno.EACCES: f"{folder} may not be written to: change its permissions",
            errno.EPERM: f"{folder} may not be written to: change its permissions",
            errno.EMFILE: "this process has too many files open: raise the limit (ulimit -n)",
        }
        words = remedies.get(error.errno or 0, f"{folder}: {os.strerror(error.errno or 0)}")
        return words + stands


def _is_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())
