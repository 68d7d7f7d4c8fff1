"""Signals that ask a job to stop are for its ranks: a rank's helper processes never see them.

Schedulers, terminals and torchrun send them to whole process groups. The rank saves, and needs its workers
until then.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """A process that is started meanwhile has them blocked, from its first moment on, and so have its own."""
    # Python's resource tracker lives as long as this process. It unblocks SIGINT and SIGTERM while it starts,
    # and ignores them; the others would end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGHUP])
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """In a helper process: once and for all."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
