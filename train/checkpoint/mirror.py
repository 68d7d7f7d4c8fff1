"""A copy of a run in S3, kept up in the background, from which a fresh machine goes on.

What is named in `latest.json` was uploaded and read back before; the file is moved by a conditional write. A
writer takes the mirror over when it starts, and the one before it notices at its next write and leaves. S3
may fail, stall and corrupt for as long as it likes: training neither waits nor fails.

Example:
    >>> mirror = CheckpointMirror("s3://bucket/runs/demo", say=print)
    >>> mirror.restore(Path("runs/demo"))        # on a fresh machine: the newest step, else None
    >>> mirror.claim()
    >>> mirror.submit(Path("runs/demo"), store.manifest())
    >>> mirror.wait(timeout_seconds=60)
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.storage import open_folder
from train.checkpoint.manifest import CheckpointManifest
from train.checkpoint.mirror_listing import LATEST_NAME, MOST_LISTING_BYTES
from train.checkpoint.mirror_restore import DiskFault, Restoring
from train.checkpoint.mirror_writer import MirrorWriter, State, TakenOver
from train.checkpoint.transfer import HeldFile, Stopped

if TYPE_CHECKING:
    from data_prep.s3 import S3Folder

ATTEMPTS = 4  # of a request; then the whole state is tried again, with waits of its own
FIRST_WAIT_SECONDS = 1.0
MOST_WAIT_SECONDS = 60.0
HURRY_WAIT_SECONDS = 0.5  # where somebody waits
RESTORE_ATTEMPTS = 2  # of a request, where the folder has a checkpoint to go on from
CHECK_SECONDS = 8.0
CHECK_NAME = ".write-check"


class CheckpointMirror:
    """Uploads the newest submitted state of a run, in a thread of its own.

    Attributes:
        taken_over: another writer has the mirror; this one touches nothing any more.
        on_taken_over: called once then, from the thread.
        trouble: why the last attempt failed, or None where it went well.
    """

    def __init__(
        self,
        location: str,
        say: Callable[[str], Any] = print,
        on_taken_over: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            location: s3://bucket/prefix/run-name.
            say: takes a sentence for the user; called from the thread, too.
            on_taken_over: see the attribute.

        Raises:
            ValueError, RuntimeError: the location names no bucket, boto3 is missing.
        """
        self.location = location
        self.taken_over = False
        self.trouble: str | None = None
        self._user_say, self.on_taken_over = say, on_taken_over
        self._writer = MirrorWriter(_s3_folder(location, ATTEMPTS), self._say)
        self._pending: State | None = None
        self._is_busy = self._is_closed = self._is_hurried = self._is_claiming = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def restore(self, folder: Path) -> int | None:
        """Bring the newest state to `folder`, if it is newer than what is there; before training.

        Called by one rank. Returns: its step, or None where `folder` stays as it is.

        Raises:
            RuntimeError: the disk cannot be written; or S3 cannot be read, and the folder has no checkpoint.
            ValueError: nothing in the mirror can be used, and the folder has no checkpoint.
        """
        restoring = Restoring(folder, self._say)
        has_own = restoring.local_step >= 0
        try:
            step = restoring.run(_s3_folder(self.location, RESTORE_ATTEMPTS if has_own else None))
        except (ValueError, RuntimeError) as error:
            if not has_own or isinstance(error, DiskFault):
                raise
            self._say(f"warning: {_words(error)}; going on from step {restoring.local_step} in {folder}")
            return None
        self._writer.seen_step = restoring.seen_step
        self._writer.damaged = frozenset(restoring.damaged)
        return step

    def claim(self) -> None:
        """Take the mirror over, in the background: another writer stops at its next write."""
        with self._wake:
            self._is_claiming = True
            self._start()

    def submit(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Have this state of the run in `folder` uploaded; returns at once, and its files may go then."""
        if self.taken_over or not manifest.checkpoints:
            return
        try:
            state = State.of(folder, manifest)
        except Exception as error:  # files that cannot be opened are no reason to stop a training
            self._say(f"warning: step {manifest.checkpoints[-1].step} is not mirrored: {_words(error)}")
            return
        with self._wake:
            outdated, self._pending = self._pending, state
            self._start()
        if outdated is not None:
            outdated.close()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all that was submitted is in the mirror; asked for so long at most."""
        with self._wake:
            self._is_hurried = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self.taken_over or self._is_idle, timeout_seconds)
            self._is_hurried = False
            return self._is_idle and not self.taken_over

    def close(self, timeout_seconds: float = 0.0) -> None:
        """End the thread, and what it uploads; wait so long for it, and for what it deletes.

        It never keeps the process alive.
        """
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        if self._thread is not None and timeout_seconds > 0:
            self._thread.join(timeout_seconds)

    @property
    def _is_idle(self) -> bool:
        return self._pending is None and not self._is_busy

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint mirror", daemon=True)
            self._thread.start()
        self._wake.notify_all()

    def _work(self) -> None:
        wait_seconds = FIRST_WAIT_SECONDS
        while (state := self._next()) is not None or not self._is_closed:
            try:
                self._attempt(state)
            except TakenOver:
                return self._leave(state)
            except Stopped:
                self._put_back(state)
            except Exception as error:  # whatever it is: training goes on, and so does this
                self._complain(error)
                self._put_back(state)
                self._pause(wait_seconds * random.uniform(0.5, 1.0))
                wait_seconds = min(MOST_WAIT_SECONDS, 2 * wait_seconds)
            else:
                wait_seconds = FIRST_WAIT_SECONDS
                self._writer.delete_unnamed(lambda: self._is_hurried and self._pending is not None)

    def _next(self) -> State | None:
        """Wait for something to do: a state to upload; None where only the mirror is to be taken over."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_closed or self._pending or self._is_claiming)
            state, self._pending = self._pending, None
            self._is_busy = not self._is_closed
        if self._is_closed and state is not None:
            state.close()
            return None
        return state

    def _attempt(self, state: State | None) -> None:
        self._writer.take_over(state)
        self._is_claiming = False
        if state is not None:
            self._writer.publish(state, lambda file: self._go_on(file))
            state.close()
        if self.trouble is not None:
            self._say(f"the mirror {self.location} works again")
        self.trouble = None
        with self._wake:
            self._is_busy = False
            self._wake.notify_all()

    def _go_on(self, file: HeldFile | None) -> None:
        """Called between files and their pieces.

        What was begun is finished even if there is something newer: else a slow S3 would never get anything
        whole. But at a stop the last state alone counts.
        """
        if self._is_closed:
            raise Stopped
        newer = self._pending
        if self._is_hurried and newer is not None and not (file is not None and newer.has(file)):
            raise Stopped

    def _put_back(self, state: State | None) -> None:
        with self._wake:
            self._is_busy = False
            if self._pending is None:
                state, self._pending = None, state
            self._wake.notify_all()
        if state is not None:
            state.close()  # a newer one is here

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._wake:
            while not self._is_closed and (left := until - time.monotonic()) > 0:
                if self._is_hurried:
                    left, until = min(left, HURRY_WAIT_SECONDS), 0.0
                self._wake.wait(left)

    def _complain(self, error: Exception) -> None:
        is_new = self.trouble is None
        self.trouble = _words(error)
        if is_new:
            self._say(
                f"warning: the mirror {self.location} is not up to date ({self.trouble}); training goes on, "
                "and it is tried again"
            )

    def _leave(self, state: State | None) -> None:
        with self._wake:
            self.taken_over, self._is_busy = True, False
            left, self._pending = [state, self._pending], None
            self._wake.notify_all()
        for old in left:
            if old is not None:
                old.close()
        self._say(f"another process took over the mirror {self.location}: this one no longer writes to it")
        with contextlib.suppress(Exception):
            self.on_taken_over()

    def _say(self, sentence: str) -> None:
        with contextlib.suppress(Exception):  # a console that is gone ends no training
            self._user_say(sentence)


def mirror_fault(location: str) -> str | None:
    """Why a mirror at `location` could not be read or written, as a sentence; in a few seconds."""
    faults: list[str | None] = []

    def look() -> None:
        try:
            folder = _s3_folder(location, 2)
            with contextlib.suppress(FileNotFoundError):
                folder.read_with_etag(LATEST_NAME, MOST_LISTING_BYTES)
            # All nodes of a deployment look at once: none may delete what another reads back.
            name = f"{CHECK_NAME}-{uuid.uuid4().hex}"
            folder.write(name, b"written by python -m train check\n")
            folder.delete(name)
        except Exception as error:
            faults.append(f"checkpoint.mirror: {_words(error)}")
        else:
            faults.append(None)

    thread = threading.Thread(target=look, name="mirror check", daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    return faults[0] if faults else f"checkpoint.mirror: {location} does not answer"


def _s3_folder(location: str, attempts: int | None) -> S3Folder:
    if not location.startswith("s3://"):
        raise ValueError(f"checkpoint.mirror {location} is no s3://bucket/prefix")
    open_folder(location)  # a sentence where boto3 is missing
    from data_prep.s3 import S3Folder

    return S3Folder(location, attempts)


def _words(error: Exception) -> str:
    words = str(error).splitlines() or [""]
    kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return (kind + words[0])[:300]
