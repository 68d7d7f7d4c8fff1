"""Leaving together with the launcher: ranks whose `torchrun` was killed must not train on.

Nobody would start them again, watch them, or free the run folder that they hold.

Example:
    >>> stop_with_parent()  # first thing in a rank
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def stop_with_parent() -> bool:
    """Ask Linux for a SIGTERM when the launcher ends, in whatever way; whether that was done.

    Nothing is done without torchrun: who starts a training in the background may log out. To be called from
    the main thread. torchrun starts its ranks, also again, from its main thread; Linux watches that thread.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    try:
        failed = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    except (OSError, AttributeError):
        return False
    if failed:
        return False
    if os.getppid() != parent:  # it ended a moment ago, and no signal will come
        signal.raise_signal(signal.SIGTERM)
    return True
